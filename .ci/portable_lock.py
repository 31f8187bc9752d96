"""`uv.lock` without addresses: the form in which it is committed.

As uv writes it, the lock names the registry and an address for every file. Neither decides a version, and both differ
between machines (a mirror, a proxy, a company's own index). The portable form keeps what decides: names, versions,
markers, dependencies, wheels and their hashes. uv takes its versions as preferences, resolves to the same ones, and
completes the file on first use.

    python3 .ci/portable_lock.py < uv.lock          the portable text on stdout; as git's clean filter, see .ci/setup
    python3 .ci/portable_lock.py --check uv.lock    fails, with the lines, on text that is not portable ('-' is stdin)
    python3 .ci/portable_lock.py --write uv.lock    rewrites the file in place

What changes, line by line (uv writes one wheel, one sdist and one dependency a line):

    source = { registry = "https://…/simple" }              ->  source = { registry = "pypi" }
    { url = "https://…/x-1-any.whl", hash = …, size = … }   ->  { filename = "x-1-any.whl", hash = … }
    sdist = …                                               ->  dropped: every package here has wheels
    [package.metadata], [package.metadata.*]                ->  dropped: uv then completes the lock, or it would trust it

Size and upload time go because not every mirror tells them. The standard library and an old `python3` are enough: git
calls this before anything is installed.
"""

import re
import sys
from itertools import zip_longest
from pathlib import Path

REGISTRY = re.compile(r'\bregistry = "[^"]*"')
WHEEL = re.compile(r'^    \{ (?:url|path) = "(?:[^"]*/)?([^"/?#]+)[^"]*"')
TOLD_BY_SOME = re.compile(r', (?:size = \d+|upload-time = "[^"]*")')
METADATA = re.compile(r"\[package\.metadata(\..*)?\]")


def portable(lock: str) -> str:
    """The lock in portable form; text that is already portable comes back unchanged."""
    kept = []
    in_metadata = False
    for line in lock.splitlines():
        if line.startswith("["):
            in_metadata = METADATA.fullmatch(line) is not None
        if in_metadata or line.startswith("sdist = "):
            continue
        if WHEEL.match(line):
            # In an address, the + of a local version (torch-2.0+cpu) is written %2B.
            line = TOLD_BY_SOME.sub("", WHEEL.sub(r'    { filename = "\1"', line)).replace("%2B", "+")
        kept.append(REGISTRY.sub('registry = "pypi"', line))
    return "\n".join(kept).rstrip("\n") + "\n"


def complaints(lock: str, name: str) -> list:
    """What keeps a text from being portable, as `name:line: text`; empty if nothing does."""
    lines = lock.splitlines()
    addresses = [f"{name}:{n}: an address: {line.strip()}" for n, line in enumerate(lines, 1) if "://" in line]
    if addresses or lock == portable(lock):
        return addresses
    pairs = enumerate(zip_longest(lines, portable(lock).splitlines()), 1)
    n, line = next(((n, have) for n, (have, wanted) in pairs if have != wanted), (len(lines), "its line ends"))
    return [f"{name}:{n}: not in portable form: {line}"]


def main(arguments: list) -> int:
    if not arguments:
        # Bytes in and out: text mode would change the line ends on Windows.
        sys.stdout.buffer.write(portable(sys.stdin.buffer.read().decode()).encode())
        return 0
    if len(arguments) != 2 or arguments[0] not in ("--check", "--write"):
        print("usage: portable_lock.py [--check FILE | --write FILE]", file=sys.stderr)
        return 2
    command, name = arguments
    lock = (sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()).decode()
    if command == "--write":
        Path(name).write_bytes(portable(lock).encode())
        return 0
    found = complaints(lock, name)
    if found:
        print(*found[:5], sep="\n", file=sys.stderr)
        print(f"{len(found)} line(s). Run: sh .ci/setup && git add --renormalize uv.lock", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
