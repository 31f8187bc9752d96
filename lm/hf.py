"""Hugging Face folders: `config.json` and safetensors ⇄ the tree, driven by each architecture's own table of names.

The table maps the *role* of a leaf (`attn.q_proj.weight`) to the key in the file (`model.layers.{i}.self_attn.q_proj.weight`); loading
reads it one way, saving the other. Our weights have Hugging Face's layout, so a row renames and nothing else.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lm.base import AbstractLM, leaves_by_path, role

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Keys that say nothing about the function computed: ids the tokenizer owns, versions, caching habits, dtype of the file.
HARMLESS = frozenset(
    {
        "architectures", "bos_token_id", "dtype", "eos_token_id", "model_type", "name_or_path", "pad_token_id", "torch_dtype",
        "transformers_version", "use_cache", "_name_or_path",
    }
)  # fmt: skip

_MISSING = object()


class ConfigReader:
    """A `config.json` read key by key, so that at the end none has gone unnoticed."""

    def __init__(self, config: Mapping[str, Any], model_type: str):
        self.config = dict(config)
        self.model_type = model_type
        self.used: set[str] = set()

    def take(self, name: str, default: Any = _MISSING) -> Any:
        """The value of a key, or `default` where it is absent or null."""
        self.used.add(name)
        value = self.config.get(name)
        if value is not None:
            return value
        if default is _MISSING:
            raise ValueError(f"config.json of model_type {self.model_type!r} lacks {name!r}")
        return default

    def expect(self, name: str, expected: Any, *, default: Any) -> None:
        """Refuse any value but the one our drawing computes."""
        value = self.take(name, default)
        if value is not default and value != expected:
            raise ValueError(
                f"config.json has {name} = {value!r}; our {self.model_type} computes {name} = {expected!r} only. "
                "Loading it anyway would give another function"
            )

    def finish(self, harmless: set[str]) -> None:
        """Refuse what nobody asked for."""
        unknown = {
            name: value
            for name, value in self.config.items()
            if name not in self.used and name not in HARMLESS and name not in harmless and value is not None
        }
        if unknown:
            raise ValueError(
                f"config.json of model_type {self.model_type!r} has keys we do not know: {unknown}. "
                "Each may change the function; handle it in from_hf, or list it there as harmless"
            )


def read_rope_base(read: ConfigReader) -> float:
    """`rope_theta`, at the top level (transformers 4) or in `rope_parameters` (transformers 5). Scaled kinds of RoPE are refused by
    name."""
    parameters = read.take("rope_parameters", {}) | read.take("rope_scaling", {})
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ValueError(f"config.json asks for RoPE of type {kind!r}; only 'default' is known")
    theta = read.take("rope_theta", parameters.get("rope_theta", 10_000.0))
    unknown = set(parameters) - {"rope_type", "type", "rope_theta"}
    if unknown:
        raise ValueError(f"config.json has rope parameters we do not know: {sorted(unknown)}")
    return float(theta)


def refuse_native(model_type: str, **settings: Any) -> None:
    """Refuse to write under a borrowed `model_type` what `transformers` would not compute."""
    native = {name: value for name, value in settings.items() if value is not None}
    if native:
        raise ValueError(
            f"transformers has no {model_type} with {', '.join(f'{name} = {value!r}' for name, value in native.items())}: "
            f"its config.json cannot say so, and it would compute another function. Such a model is kept in checkpoints, not exported"
        )


def check_heads(n_heads: int, n_kv_heads: int, head_dim: int) -> None:
    """Head counts that cannot be grouped or rotated, in words."""
    if n_heads % n_kv_heads:
        raise ValueError(
            f"n_heads ({n_heads}) must be a multiple of n_kv_heads ({n_kv_heads}): each key head serves n_heads / n_kv_heads query heads. "
            f"Divisors of {n_heads}: {[d for d in range(1, n_heads + 1) if n_heads % d == 0]}"
        )
    if head_dim % 2:
        raise ValueError(f"head_dim ({head_dim}) must be even: RoPE turns pairs")


def hf_key(path: str, names: Mapping[str, str]) -> str:
    """The file's key for one of our leaves."""
    this_role = role(path)
    if this_role not in names:
        raise ValueError(f"leaf {path} (role {this_role}) has no Hugging Face name; the table knows {sorted(names)}")
    layer = re.match(r"blocks/(\d+)/", path)
    return names[this_role].format(i=layer.group(1) if layer else "")


def abstract(init: Callable[..., AbstractLM], config: Any) -> AbstractLM:
    """The tree without its numbers: every array a `jax.ShapeDtypeStruct`."""
    return eqx.filter_eval_shape(lambda key: init(config, key=key), jr.key(0))


def load_weights(skeleton: AbstractLM, names: Mapping[str, str], folder: Path, *, dtype: Any = None) -> AbstractLM:
    """Fill an abstract tree from a folder's safetensors, one tensor at a time.

    **Raises:** `ValueError` listing every tensor that is missing, left over, or of another shape.
    """
    files = _files_of(folder)
    wanted = {hf_key(path, names): leaf for path, leaf in leaves_by_path(skeleton).items()}
    problems = [f"missing: {key} {leaf.shape}" for key, leaf in wanted.items() if key not in files]
    problems += [f"left over: {key}" for key in files if key not in wanted]
    loaded: dict[str, jax.Array] = {}
    for file in sorted(set(files.values())):
        with _open(file) as tensors:
            for key in (key for key, where in files.items() if where == file and key in wanted):
                if tuple(tensors.get_slice(key).get_shape()) != wanted[key].shape:
                    problems.append(f"shape: {key} is {tuple(tensors.get_slice(key).get_shape())}, expected {wanted[key].shape}")
                elif not problems:
                    loaded[key] = jnp.asarray(tensors.get_tensor(key), dtype=dtype)
    if problems:
        raise ValueError(f"{folder} does not hold the model its config.json describes:\n  " + "\n  ".join(problems))
    leaves = [loaded[hf_key(path, names)] for path in leaves_by_path(skeleton)]
    return jax.tree.unflatten(jax.tree.structure(skeleton), leaves)


def save_folder(
    model: AbstractLM, names: Mapping[str, str], folder: Path, *, dtype: Any = None, extra_config: Mapping[str, Any] | None = None
) -> None:
    """Write `config.json` and `model.safetensors`; `dtype=None` keeps the arrays' own. `extra_config` adds token ids and the like."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        hf_key(path, names): np.asarray(leaf if dtype is None else leaf.astype(dtype)) for path, leaf in leaves_by_path(model).items()
    }
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    stored = str(next(iter(tensors.values())).dtype)
    config = model.config.to_hf() | {"dtype": stored} | dict(extra_config or {})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="np")
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}): was the download or copy cut short?") from error


def _files_of(folder: Path) -> dict[str, Path]:
    """Which file holds which tensor."""
    if (folder / INDEX_FILE).is_file():
        weight_map = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
        return {key: folder / name for key, name in weight_map.items()}
    if not (folder / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(f"{folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}")
    with _open(folder / WEIGHTS_FILE) as tensors:
        return dict.fromkeys(tensors.keys(), folder / WEIGHTS_FILE)
