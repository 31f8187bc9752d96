"""`uv.lock` is committed without addresses, and the working copy that uv completes does not show as changed."""

import importlib.util
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / ".ci" / "portable_lock.py"

spec = importlib.util.spec_from_file_location("portable_lock", SCRIPT)
assert spec is not None
assert spec.loader is not None
portable_lock = importlib.util.module_from_spec(spec)
spec.loader.exec_module(portable_lock)
portable = portable_lock.portable

COMPLETE = """\
version = 1
requires-python = ">=3.11"

[[package]]
name = "einops"
version = "0.8.2"
source = { registry = "https://mirror.example/simple" }
dependencies = [
    { name = "numpy", version = "2.4.6", source = { registry = "https://mirror.example/simple" } },
]
sdist = { url = "https://f.example/2c/einops-0.8.2.tar.gz", hash = "sha256:60", size = 5, upload-time = "2026-01-26T04Z" }
wheels = [
    { url = "https://f.example/2a/einops-0.8.2-py3-none-any.whl", hash = "sha256:54", size = 6, upload-time = "2026-01Z" },
    { path = "/wheels/einops-0.8.2%2Bcpu-cp311-cp311-linux_x86_64.whl", hash = "sha256:55" },
]

[[package]]
name = "here"
version = "0.1.0"
source = { editable = "." }
dependencies = [
    { name = "einops" },
]

[package.metadata]
requires-dist = [{ name = "einops", specifier = ">=0.8" }]

[package.metadata.requires-dev]
dev = [{ name = "ruff", specifier = ">=0.17" }]

[[package]]
name = "last"
version = "1.0"
source = { registry = "https://mirror.example/simple" }
"""

PORTABLE = """\
version = 1
requires-python = ">=3.11"

[[package]]
name = "einops"
version = "0.8.2"
source = { registry = "pypi" }
dependencies = [
    { name = "numpy", version = "2.4.6", source = { registry = "pypi" } },
]
wheels = [
    { filename = "einops-0.8.2-py3-none-any.whl", hash = "sha256:54" },
    { filename = "einops-0.8.2+cpu-cp311-cp311-linux_x86_64.whl", hash = "sha256:55" },
]

[[package]]
name = "here"
version = "0.1.0"
source = { editable = "." }
dependencies = [
    { name = "einops" },
]

[[package]]
name = "last"
version = "1.0"
source = { registry = "pypi" }
"""


def run(*command: str, cwd: Path = ROOT, text: str | None = None) -> subprocess.CompletedProcess[str]:
    # A hook or a rebase that runs the tests leaves GIT_DIR and GIT_INDEX_FILE behind, which would beat `cwd`.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return subprocess.run(command, cwd=cwd, input=text, capture_output=True, encoding="utf-8", env=environment)


def versions(lock: str) -> list[tuple[str, str]]:
    return [(package["name"], package["version"]) for package in tomllib.loads(lock)["package"]]


def test_the_portable_form_is_what_it_says() -> None:
    assert portable(COMPLETE) == PORTABLE


def test_the_portable_form_of_a_portable_lock_is_itself() -> None:
    assert portable(PORTABLE) == PORTABLE


def test_this_lock_keeps_versions_and_hashes_and_loses_addresses() -> None:
    lock = (ROOT / "uv.lock").read_text()
    once = portable(lock)
    assert "://" not in once
    assert portable(once) == once
    assert versions(once) == versions(lock)
    for before, after in zip(tomllib.loads(lock)["package"], tomllib.loads(once)["package"], strict=True):
        assert [w["hash"] for w in before.get("wheels", [])] == [w["hash"] for w in after.get("wheels", [])]
        # Where there is no wheel, dropping the sdist would drop the only file.
        assert after.get("wheels") or after["source"] == {"editable": "."}, f"{after['name']} has no wheel"


def test_this_lock_serves_the_floor_python_and_the_newer_ones() -> None:
    packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    for name in ("jax", "jaxlib"):
        by_version = {p["version"]: p["resolution-markers"] for p in packages if p["name"] == name}
        floor, newer = sorted(by_version, key=lambda version: [int(part) for part in version.split(".")])
        assert by_version[floor] == ["python_full_version < '3.12'"]
        assert "python_full_version == '3.12.*'" in by_version[newer]
        assert "python_full_version == '3.13.*'" in by_version[newer]


def test_the_committed_lock_names_no_address() -> None:
    committed = run("git", "show", ":uv.lock")
    if committed.returncode:
        pytest.skip("not a git checkout with uv.lock in its index")
    assert portable_lock.complaints(committed.stdout, ":uv.lock") == []


def test_check_lists_lines_and_says_what_to_do(tmp_path: Path) -> None:
    lock = tmp_path / "uv.lock"
    lock.write_text(COMPLETE)
    refused = run(sys.executable, str(SCRIPT), "--check", str(lock))
    assert refused.returncode == 1
    assert f"{lock}:7: an address: source" in refused.stderr
    assert "sh .ci/setup" in refused.stderr
    assert run(sys.executable, str(SCRIPT), "--write", str(lock)).returncode == 0
    assert lock.read_text() == PORTABLE
    assert run(sys.executable, str(SCRIPT), "--check", str(lock)).returncode == 0
    assert run(sys.executable, str(SCRIPT), "--check", "-", text=PORTABLE).returncode == 0


def test_check_refuses_what_has_no_address_and_is_not_portable() -> None:
    refused = run(sys.executable, str(SCRIPT), "--check", "-", text=PORTABLE + "\n[package.metadata]\n")
    assert refused.returncode == 1
    assert "not in portable form" in refused.stderr


def test_an_address_that_has_no_portable_form_is_refused() -> None:
    from_git = PORTABLE + '\n[[package]]\nname = "fork"\nsource = { git = "https://host.example/fork?rev=1" }\n'
    assert len(portable_lock.complaints(portable(from_git), "uv.lock")) == 1


def test_the_filter_keeps_the_completed_lock_from_showing_as_changed(tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    for name in (".ci/portable_lock.py", ".ci/setup", ".gitattributes"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    lock = tmp_path / "uv.lock"
    lock.write_text(COMPLETE)
    try:
        assert run("git", "init", "-q", cwd=tmp_path).returncode == 0
    except FileNotFoundError:
        pytest.skip("needs git")
    assert run("sh", ".ci/setup", cwd=tmp_path).returncode == 0

    git = ("git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    assert run(*git, "add", "-A", cwd=tmp_path).returncode == 0
    assert run(*git, "commit", "-q", "--no-verify", "-m", "lock", cwd=tmp_path).returncode == 0
    assert run("git", "show", "HEAD:uv.lock", cwd=tmp_path).stdout == PORTABLE

    # uv completes what a clone or a pull brought. git sees another size, and asks the filter only when it compares.
    lock.write_text(PORTABLE)
    assert run("git", "add", "uv.lock", cwd=tmp_path).returncode == 0
    lock.write_text(COMPLETE)
    assert run("git", "diff", "--exit-code", cwd=tmp_path).returncode == 0
    assert run("sh", ".ci/setup", cwd=tmp_path).returncode == 0
    assert run("git", "status", "--porcelain", cwd=tmp_path).stdout == ""

    # A version that really changed is shown, and setup does not stage it.
    lock.write_text(COMPLETE.replace("0.8.2", "0.8.3"))
    assert run("sh", ".ci/setup", cwd=tmp_path).returncode == 0
    assert run("git", "status", "--porcelain", cwd=tmp_path).stdout == " M uv.lock\n"
