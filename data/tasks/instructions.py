"""Small instructions with one right answer, made on this machine: sums, strings, and questions about the code of the standard library.

Each is a row `{"messages", "task", "answer"}`. What is held out depends on what is asked about, not on how: the two numbers of a sum, the
word, the source file; so no held-out question was trained on in another phrasing, nor with its operands swapped. `score` says whether a
reply is right.

    arithmetic   What is 23 + 45?                                       → 68
    strings      Write the word "lamp" backwards.                       → pmal
    arguments    Which arguments does this function take? def f(a, b):  → a, b
    signature    Write the signature of `popitem`, which does this: …   → def popitem(self):
    completion   Continue this line: for name in sorted(                → …
"""

import ast
import functools
import json
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.documents import Documents, Source

NAME = "instructions"  # what a user types for it
ROWS = 24_000  # over all tasks, held-out ones included
MOST_IN_A_SUM = 99
IN_VAIN = 2000  # questions drawn in a row that were all asked before
LONGEST = 240  # characters of code in a question

TASKS = ("arithmetic", "strings", "arguments", "signature", "completion")

_SUMS = (
    "What is {a} {sign} {b}?",
    "{a} {sign} {b} =",
    "Calculate {a} {sign} {b}.",
    "Please work out {a} {sign} {b}.",
    "How much is {a} {sign} {b}?",
)
_STRING_TASKS = {  # asked how → answered how
    "backwards": (
        ('Write the word "{word}" backwards.', 'Reverse "{word}".', 'Spell "{word}" from its end to its start.'),
        lambda word: word[::-1],
    ),
    "upper": (('Write "{word}" in capital letters.', 'Put "{word}" into upper case.', 'Capitalize every letter of "{word}".'), str.upper),
    "first": (('What is the first letter of "{word}"?', 'Which letter does "{word}" begin with?'), lambda word: word[0]),
    "last": (('What is the last letter of "{word}"?', 'Which letter does "{word}" end with?'), lambda word: word[-1]),
    "length": (('How many letters has "{word}"?', 'Count the letters of "{word}".'), lambda word: str(len(word))),
    "twice": (('Write "{word}" twice.', 'Repeat "{word}" two times.'), lambda word: f"{word} {word}"),
    "spelled": (('Spell "{word}" with dashes.', 'Put a dash between the letters of "{word}".'), "-".join),
}
_ARGUMENTS = (
    "Which arguments does this function take?\n{code}",
    "List the arguments of this function.\n{code}",
    "{code}\nName the arguments of the function above.",
)
_SIGNATURES = (
    "Write the signature of `{name}`, a function that does this: {doc}",
    "A function `{name}` has this docstring:\n{doc}\nWrite its signature.",
    "How is the function `{name}` declared? {doc}",
)
_COMPLETIONS = ("Complete this line of Python:\n{code}", "Continue this line: {code}", "What comes after this?\n{code}")


def source(rows: int = ROWS, seed: int = 0, root: Path | None = None) -> Source:
    """The rows as documents, the same for a seed and a Python: a twentieth of the operands, words and files is held out.

    `root`: a folder of Python files in place of the standard library.
    """
    kept = Documents(NAME, "error")
    for group, row in _rows(rows, seed, root or Path(sysconfig.get_path("stdlib"))):
        kept.add(f"{row['task']}:{len(kept) + 1}", json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass"), NAME, group=group)
    return kept.source(NAME, {"kind": NAME, "rows": rows, "seed": seed, "held_out_together": "operands, words, source files"})


def score(reply: str, answer: str) -> bool:
    """Whether a reply is the answer, letter for letter but for white space around it."""
    return reply.strip() == answer.strip()


def holds(reply: str, answer: str) -> bool:
    """Whether the answer stands in a reply as a word or words of its own, whatever is said around it."""
    return re.search(rf"(?<!\w){re.escape(answer.strip())}(?!\w)", reply) is not None


def _rows(rows: int, seed: int, root: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a row is about, and the row; each question once."""
    rng = random.Random(seed)
    files = _functions_by_file(root)
    words = sorted({word for _, functions in files for function in functions for word in _words(function)})
    asked: set[str] = set()
    in_vain = 0
    while len(asked) < rows:
        task = TASKS[len(asked) % len(TASKS)]
        if task == "arithmetic":
            group, question, answer = _arithmetic(rng)
        elif task == "strings":
            group, question, answer = _strings(rng, words)
        else:
            group, question, answer = _code(rng, files, task)
        in_vain += 1
        if in_vain > IN_VAIN:
            raise ValueError(
                f"there are hardly more than {len(asked) // len(TASKS)} different questions of the task '{task}': make fewer rows"
            )
        if question not in asked:
            asked.add(question)
            in_vain = 0
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            yield group, {"messages": messages, "task": task, "answer": answer}


def _arithmetic(rng: random.Random) -> tuple[str, str, str]:
    a, b, sign = rng.randint(0, MOST_IN_A_SUM), rng.randint(0, MOST_IN_A_SUM), rng.choice("+-")
    result = a + b if sign == "+" else a - b
    return f"{min(a, b)} and {max(a, b)}", rng.choice(_SUMS).format(a=a, b=b, sign=sign), str(result)


def _strings(rng: random.Random, words: list[str]) -> tuple[str, str, str]:
    word = rng.choice(words)
    phrasings, answered = _STRING_TASKS[rng.choice(sorted(_STRING_TASKS))]
    return word, rng.choice(phrasings).format(word=word), answered(word)


def _code(rng: random.Random, files: list[tuple[str, list["_Function"]]], task: str) -> tuple[str, str, str]:
    while True:
        name, functions = rng.choice(files)
        function = rng.choice(functions)
        if task == "arguments":
            return name, rng.choice(_ARGUMENTS).format(code=function.header), function.arguments
        if task == "signature" and function.doc:
            return name, rng.choice(_SIGNATURES).format(name=function.name, doc=function.doc), function.header
        if task == "completion" and function.lines:
            line = rng.choice(function.lines)
            cuts = [match.end() for match in re.finditer(r"\b\W+", line) if len(line) // 2 <= match.end() < len(line)]
            cut = rng.choice(cuts or [len(line) // 2])
            return name, rng.choice(_COMPLETIONS).format(code=line[:cut].rstrip()), line[cut:].strip()


# ------------------------------------------------------------------------------------------- the standard library


class _Function:
    """What is asked about a function."""

    def __init__(self, node: ast.FunctionDef, lines: list[str]) -> None:
        self.name = node.name
        given = node.args
        for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg):
            if argument is not None:
                argument.annotation = None
        no_defaults: list[ast.expr | None] = [None] * len(given.kwonlyargs)
        self.arguments = ast.unparse(
            ast.arguments(given.posonlyargs, given.args, given.vararg, given.kwonlyargs, no_defaults, given.kwarg, [])
        )
        self.header = f"def {node.name}({ast.unparse(node.args)}):"
        self.doc = (ast.get_docstring(node) or "").split("\n")[0]
        body = (line.strip() for line in lines[node.lineno : node.end_lineno])
        self.lines = [line for line in body if 20 <= len(line) <= 70 and not line.startswith(("#", '"', "'"))]


@functools.lru_cache(maxsize=2)
def _functions_by_file(root: Path) -> list[tuple[str, list[_Function]]]:
    """The functions of each file that has some."""
    found = []
    for path in sorted([*root.glob("*.py"), *(file for name in _PACKAGES for file in root.glob(f"{name}/*.py"))]):
        text = path.read_text(encoding="utf-8", errors="replace")
        lines = text.splitlines()
        nodes = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef) and node.args.args)
        functions = [function for function in (_Function(node, lines) for node in nodes) if len(function.header + function.doc) <= LONGEST]
        if functions:
            found.append((path.relative_to(root).as_posix(), functions))
    return found


_PACKAGES = (  # of the standard library; those read for their own sake
    "asyncio", "collections", "concurrent/futures", "email", "html", "http",
    "importlib", "json", "logging", "multiprocessing", "urllib", "xml/dom",
)  # fmt: skip


def _words(function: _Function) -> list[str]:
    """Of its docstring: small letters only, of a length that a small model can spell."""
    return re.findall(r"(?<![\w-])[a-z]{3,9}(?![\w-])", function.doc)
