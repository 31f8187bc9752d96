"""The floors of the house: which module may import which.

Imports are read from the source (`ast`), lazy ones inside functions too, so nothing is run. The checker takes
`{path: source}` and returns every violation as `path:line: what is wrong`; below it stand the test of the tree and the
tests of the checker.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("lm", "data", "train", "recipes")

# From the ground up; a module may import its own floor (without circles) and those before it.
LM_FLOORS = (
    ("masks", "kernels", "kernels_cpu", "kernels_cpu_attention", "kernels_experts", "quant", "digests"),
    ("layers", "rope", "cache", "moe", "sampling"),
    ("base",),
    ("attention",),
    (
        *("flight", "adapters", "adapter_files", "native", "surgery", "inside", "decoding", "generate"),
        *("hf", "hf_config", "hf_files", "hub", "gguf", "models.*"),
    ),
    ("models",),
    ("",),  # lm/__init__.py
)
MAY_NOT_IMPORT = {
    "lm": ("data", "train", "recipes"),
    # Grain's worker processes import data; one that touches a device takes it from the trainer.
    "data": ("lm", "train", "recipes", "jax", "jaxlib", "equinox", "optax"),
    "train": ("recipes",),
    "recipes": (),
}
TRAIN_MAY_TAKE = (
    "data.pipeline.Batch",
    "data.requests.RequestBatch",
    "data.requests.ScoredRows",
)  # and other types, as they come: no function of data belongs here


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def lm_floor(module: str) -> int | None:
    """0 is the lowest; `None` if the module stands on no floor."""
    name = module.removeprefix("lm").removeprefix(".")
    name = "models.*" if name.startswith("models.") else name
    return next((floor for floor, names in enumerate(LM_FLOORS) if name in names), None)


def imports(path: str, source: str, modules: set[str]) -> Iterator[tuple[int, str, str]]:
    """(line, module, name taken from it or ''); `from lm import rope` is the module lm.rope where that is one."""
    package = module_name(path).split(".")
    if not path.endswith("__init__.py"):
        package = package[:-1]
    tree = ast.parse(source, path)
    types_only = {
        below
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for part in node.body
        for below in ast.walk(part)
    }
    for node in ast.walk(tree):
        if package[0] == "recipes" and node in types_only:  # names for annotations, never imported; the floors below may not even name
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield (node.lineno, full, "") if full in modules else (node.lineno, base, alias.name)


def violations(sources: dict[str, str]) -> list[str]:
    """Every breach of the floors in these files, as `path:line: what`."""
    modules = {module_name(path) for path in sources}
    found = []
    edges: dict[str, dict[str, str]] = {}  # importer -> imported -> the place
    for path, source in sorted(sources.items()):
        here, package = module_name(path), path.split("/")[0]
        if package == "lm" and lm_floor(here) is None:
            found.append(f"{path}:1: stands on no floor; give it a place in LM_FLOORS of tests/test_floors.py")
        for line, there, name in imports(path, source, modules):
            wrong = [f"{path}:{line}: {breach}" for breach in breaches(here, package, there, name)]
            found += wrong
            if there in modules and not wrong:
                edges.setdefault(here, {}).setdefault(there, f"{path}:{line}")
    return found + circles(edges)


def breaches(here: str, package: str, there: str, name: str) -> Iterator[str]:
    """What is wrong with one import."""
    top = there.split(".")[0]
    if top in MAY_NOT_IMPORT[package]:
        yield f"{package} may not import {there}"
    if here == there or here.startswith(f"{there}."):
        yield f"{here} imports the __init__ of its own package {there}; name the module"
    elif package == top == "lm":
        mine, its = lm_floor(here), lm_floor(there)
        if mine is not None and its is not None and its > mine:
            yield f"{here} imports {there}, which stands on a higher floor"
    taken = f"{there}.{name}" if name else there
    if package == "train" and top == "data" and taken not in TRAIN_MAY_TAKE:
        yield f"train takes {taken}; from data it may take only {', '.join(TRAIN_MAY_TAKE)}"


def circles(edges: dict[str, dict[str, str]]) -> list[str]:
    """Circles of imports, each told once, from the module first in the alphabet."""
    found, finished = [], set()

    def walk(module: str, trail: list[str]) -> None:
        if module in trail:
            circle = trail[trail.index(module) :]
            start = circle.index(min(circle))
            circle = [*circle[start:], *circle[: start + 1]]
            found.append(f"{edges[circle[0]][circle[1]]}: a circle: {' -> '.join(circle)}")
        elif module not in finished:
            for there in edges.get(module, {}):
                walk(there, [*trail, module])
            finished.add(module)

    for module in edges:
        walk(module, [])
    return found


def test_the_house_stands_on_its_floors() -> None:
    sources = {p.relative_to(ROOT).as_posix(): p.read_text() for top in PACKAGES for p in (ROOT / top).rglob("*.py")}
    found = violations(sources)
    assert not found, "\n" + "\n".join(found)


ALLOWED = {
    "lm/__init__.py": "from lm.attention import Attention\nfrom lm.models import load_pretrained\n",
    "lm/masks.py": "import jax.numpy as jnp\n",
    "lm/kernels.py": "from lm.masks import Facts\n",
    "lm/layers.py": "from lm import kernels\nfrom . import quant\n",
    "lm/quant.py": "",
    "lm/base.py": "from lm.layers import Linear\n",
    "lm/attention.py": "from lm.base import mark\nfrom .masks import Facts\n",
    "lm/hf.py": "import lm.attention\n",
    "lm/generate.py": "from lm import hf\n",
    "lm/models/__init__.py": "from lm.models.llama import Llama\n",
    "lm/models/llama.py": "from lm import hf\nfrom lm.attention import Attention\n",
    "lm/models/qwen3.py": "from lm.models.llama import Block\n",
    "data/__init__.py": "from data.pipeline import Batch\n",
    "data/pipeline.py": "import grain\nimport numpy as np\n",
    "train/step.py": "import lm\nfrom lm.base import AbstractLM\nfrom data.pipeline import Batch\n",
    "recipes/pretrain.py": "import data\nimport lm\nfrom train import step\nfrom recipes import chat\n",
    "recipes/chat.py": "",
}


def test_an_orderly_house_has_no_violation() -> None:
    assert violations(ALLOWED) == []


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("lm/rope.py", "import math\nimport data.tokenizer\n", "lm/rope.py:2: lm may not import data.tokenizer"),
        ("lm/rope.py", "from train import step\n", "lm/rope.py:1: lm may not import train.step"),
        ("lm/rope.py", "def f():\n    import recipes\n", "lm/rope.py:2: lm may not import recipes"),
        ("data/chat.py", "import jax.numpy as jnp\n", "data/chat.py:1: data may not import jax.numpy"),
        ("data/tasks/sums.py", "from lm import rope\n", "data/tasks/sums.py:1: data may not import lm"),
        ("train/loop.py", "from recipes import chat\n", "train/loop.py:1: train may not import recipes.chat"),
        ("train/loop.py", "from data.pipeline import batches\n", "train/loop.py:1: train takes data.pipeline.batches"),
        ("train/loop.py", "from data import pipeline\n", "train/loop.py:1: train takes data.pipeline;"),
        ("train/loop.py", "from data import Batch\n", "train/loop.py:1: train takes data.Batch;"),
        ("lm/kernels.py", "import os\nfrom lm import layers\n", "lm/kernels.py:2: lm.kernels imports lm.layers, which"),
        ("lm/cache.py", "from .base import mark\n", "lm/cache.py:1: lm.cache imports lm.base, which"),
        ("lm/hf.py", "from lm.models import load\n", "lm/hf.py:1: lm.hf imports lm.models, which"),
        (
            "lm/rope.py",
            "from lm import Attention\n",
            "lm/rope.py:1: lm.rope imports the __init__",
        ),
        (
            "lm/rope.py",
            "from . import Attention\n",
            "lm/rope.py:1: lm.rope imports the __init__",
        ),
        (
            "lm/models/gpt2.py",
            "from . import load\n",
            "lm/models/gpt2.py:1: lm.models.gpt2 imports the __init__",
        ),
        ("data/chat.py", "import data\n", "data/chat.py:1: data.chat imports the __init__"),
        ("lm/extras.py", "", "lm/extras.py:1: stands on no floor"),
    ],
)
def test_a_breach_is_found_with_its_line(path: str, source: str, expected: str) -> None:
    found = violations({**ALLOWED, path: source})
    assert len(found) == 1
    assert found[0].startswith(expected)


def test_a_circle_on_one_floor_is_found_once() -> None:
    circle = {
        "lm/hf.py": "import lm.gguf\n",
        "lm/gguf.py": "\nimport lm.adapters\n",
        "lm/adapters.py": "import lm.hf\n",
    }
    found = violations({**ALLOWED, **circle})
    assert found == ["lm/adapters.py:1: a circle: lm.adapters -> lm.hf -> lm.gguf -> lm.adapters"]


def test_every_violation_is_listed() -> None:
    found = violations({"lm/rope.py": "import data\nimport train\n", "data/chat.py": "import jax\n"})
    assert [line.rsplit(":", 1)[0] for line in found] == ["data/chat.py:1", "lm/rope.py:1", "lm/rope.py:2"]
