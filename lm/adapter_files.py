"""Adapters in PEFT's files, `adapter_model.safetensors` and `adapter_config.json` (https://huggingface.co/docs/peft), and the base they
belong to.

A tensor is called `base_model.model.` + the module's name in Hugging Face's model + `.lora_A.weight` (our `down`), `.lora_B.weight` (`up`)
or `.lora_magnitude_vector`; the names come from the family's own table. Where a file has one tensor for several of our matrices (queries,
keys and values of GPT-2 or Phi-3), their adapters become one: `lora_A` holds the `down`s one below the other, `lora_B` the `up`s along its
diagonal. Read back, each of ours has all of `lora_A` and its own rows of `lora_B`. The function is the same either way.

What is trained beside the adapters (`also`) goes under PEFT's `modules_to_save`.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lm.adapters import LoRA, adapters_of, map_nodes, trainable_filter, without_adapters
from lm.base import AbstractLM, leaves_by_path
from lm.digests import digest_of, leaf_digests
from lm.hf import Names, Piece, by_key, cut, joined, stored_leaf
from lm.hf_files import read_json
from lm.layers import Linear
from lm.quant import Quantised

Model = TypeVar("Model", bound=AbstractLM)

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_DIGEST = "base_digest"  # in the file's metadata, which PEFT does not look at


@dataclass(frozen=True)
class Base:
    """The model that adapters belong to."""

    name: str  # as on the Hub; of a path of this machine only the last part
    digest: str  # of every number, widened to fp32: one for a bf16 model and the same in fp32

    @staticmethod
    def of(model: AbstractLM, name: str | Path) -> "Base":
        """Of a model as it was loaded: rounded to fewer bits it would be another. Adapters already on it are not looked at."""
        digests: dict[str, str] = {}
        for path, leaf in leaves_by_path(without_adapters(model)).items():
            if eqx.is_array(leaf):
                digests |= leaf_digests({path: leaf.astype(jnp.float32) if eqx.is_inexact_array(leaf) else leaf})
        return Base(Path(name).name if Path(name).exists() else str(name), digest_of(digests))

    def record(self) -> dict[str, str]:
        return {"name": self.name, "digest": self.digest}


class Slot(NamedTuple):
    """A matrix of the file's model: what of ours it is made of."""

    pieces: list[Piece]  # none is transposed: adapters never are

    @property
    def paths(self) -> list[str]:
        """Of the linear maps."""
        return [piece.path.removesuffix("/weight") for piece in self.pieces]


def _slots(model: AbstractLM, names: Names) -> tuple[dict[str, Slot], dict[str, list[Piece]]]:
    """The matrices that adapters can be put on, by the module's name; and all tensors, by key."""
    skeleton = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, Quantised) else leaf,
        without_adapters(model),
        is_leaf=lambda node: isinstance(node, Quantised),
    )
    tensors = by_key(skeleton, names)
    matrices = {key: pieces for key, pieces in tensors.items() if key.endswith(".weight") and pieces[0].path.startswith("blocks/")}
    plain = {key: [piece._replace(stored=replace(piece.stored, transposed=False)) for piece in pieces] for key, pieces in matrices.items()}
    single = {key: pieces for key, pieces in plain.items() if pieces[0].expert is None and len(pieces[0].shape) == 2}
    return {key.removesuffix(".weight"): Slot(pieces) for key, pieces in single.items()}, tensors


# ------------------------------------------------------------------------------------------- writing


def save_adapter(model: AbstractLM, names: Names, folder: Path, *, base: Base, also: Sequence[str] = ()) -> None:
    """Write a model's adapters, in fp32, as PEFT keeps them; see `lm.save_adapter`."""
    adapters = adapters_of(model)
    trained = trainable_filter(model, also)  # checks both
    slots, tensors = _slots(model, names)
    slots = {module: slot for module, slot in slots.items() if any(path in adapters for path in slot.paths)}
    found: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for module, slot in slots.items():
        arrays, settings[module] = _written(slot, adapters)
        found |= {f"{_PREFIX}{module}.{name}": array for name, array in arrays.items()}
    extra = _modules_trained(trained, tensors)
    for key in [key for keys in extra.values() for key in keys]:
        found[f"{_PREFIX}{key}"] = joined([np.asarray(piece.leaf) for piece in tensors[key]], tensors[key])
    config = _config(settings, {key.rpartition(".")[0] for key in tensors}, base) | {
        "modules_to_save": sorted(extra) or None,
        "ensure_weight_tying": model.config.tied and stored_leaf("embed/weight", names).key.rpartition(".")[0] in extra,
    }
    folder.mkdir(parents=True, exist_ok=True)
    floats = {key: np.ascontiguousarray(array, np.float32) for key, array in found.items()}
    save_file(floats, folder / f".{ADAPTER_FILE}.writing", metadata={"format": "pt", _DIGEST: base.digest})
    (folder / f".{ADAPTER_CONFIG}.writing").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in (ADAPTER_FILE, ADAPTER_CONFIG):
        os.replace(folder / f".{name}.writing", folder / name)


class Settings(NamedTuple):
    """What PEFT's config says of a module."""

    rank: int
    alpha: float
    rslora: bool
    dora: bool
    dropout: float


def _written(slot: Slot, adapters: Mapping[str, LoRA]) -> tuple[dict[str, np.ndarray], Settings]:
    """The tensors of one module, and what the config has to say of them."""
    loras = [adapters.get(path) for path in slot.paths]
    present = [lora for lora in loras if lora is not None]
    first = present[0]
    downs = [np.asarray(lora.down) for lora in present]
    shared = len(present) == len(loras) and all(np.array_equal(down, downs[0]) for down in downs)
    down = downs[0] if shared else np.concatenate(downs)
    ups, column = [], 0
    for lora, piece in zip(loras, slot.pieces, strict=True):
        up = np.zeros((piece.shape[0], len(down)), np.float32)
        if lora is not None:
            up[:, column : column + lora.rank] = np.asarray(lora.up, np.float32) * (lora.scale / first.scale)
            column += 0 if shared else lora.rank
        ups.append(up)
    arrays = {"lora_A.weight": down, "lora_B.weight": joined(ups, slot.pieces)}
    magnitudes = [lora.magnitude for lora in present if lora.magnitude is not None]
    if magnitudes:
        if len(magnitudes) < len(loras):
            raise ValueError(f"{', '.join(slot.paths)} are one tensor in the file, and DoRA is on some of them only: PEFT cannot say that")
        arrays["lora_magnitude_vector"] = joined([np.asarray(each)[:, None] for each in magnitudes], slot.pieces)[:, 0]
    alpha = first.scale * (len(down) ** 0.5 if first.rslora else len(down))
    return arrays, Settings(len(down), round(alpha, 9), first.rslora, bool(magnitudes), first.dropout)


def _config(settings: Mapping[str, Settings], modules: set[str], base: Base) -> dict[str, Any]:
    """`adapter_config.json`. Modules are named by their last part where that means no other, else in full."""
    targets: set[str] = set()
    for module in settings:
        last = module.rpartition(".")[2]
        alike = {other for other in modules if other.endswith(f".{last}")}
        targets.add(last if alike <= settings.keys() else module)
    usual = Counter(each._replace(dropout=0.0) for each in settings.values()).most_common(1)[0][0]
    if any((each.rslora, each.dora) != (usual.rslora, usual.dora) for each in settings.values()):
        raise ValueError("PEFT has one word for all adapters of a model on rsLoRA, and one on DoRA: here some have it and some have not")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "r": usual.rank,
        "lora_alpha": usual.alpha,
        "rank_pattern": {module: each.rank for module, each in settings.items() if each.rank != usual.rank},
        "alpha_pattern": {module: each.alpha for module, each in settings.items() if each.alpha != usual.alpha},
        "lora_dropout": max(each.dropout for each in settings.values()),
        "target_modules": sorted(targets),
        "use_rslora": usual.rslora,
        "use_dora": usual.dora,
        "fan_in_fan_out": False,  # PEFT sees by itself where a module is GPT-2's Conv1D
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
    }


def _modules_trained(trained: AbstractLM, tensors: Mapping[str, list[Piece]]) -> dict[str, list[str]]:
    """The modules that hold something trained beside the adapters, each with all its tensors."""
    paths = {path for path, is_trained in leaves_by_path(trained).items() if is_trained}
    modules = {key.rpartition(".")[0] for key, pieces in tensors.items() if any(_in_wrapper(piece.path) & paths for piece in pieces)}
    return {module: [key for key in tensors if key.rpartition(".")[0] == module] for module in modules}


def _in_wrapper(path: str) -> set[str]:
    """Where a leaf may lie, in its layer or in the base of an adapter."""
    layer, _, name = path.rpartition("/")
    return {path, f"{layer}/base/{name}"}


# ------------------------------------------------------------------------------------------- reading

# Settings of `adapter_config.json` that say nothing the tensors do not.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "layers_pattern", "layers_to_transform", "megatron_core", "modules_to_save", "peft_version", "qalora_group_size", "revision",
    "target_modules", "task_type",
}  # fmt: skip
_READ = {"alpha_pattern", "init_lora_weights", "lora_alpha", "lora_dropout", "peft_type", "r", "rank_pattern", "use_dora", "use_rslora"}
_KEEPS_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")  # ways to begin that leave the base as it was


def load_adapter(model: Model, names: Names, folder: Path, *, base: Base | None = None) -> Model:
    """Put a folder's adapters on a model; see `lm.load_adapter`."""
    if adapters_of(model):
        raise ValueError("this model has adapters already: merge them, or load these onto the model as it was")
    config = read_json(_file(folder, ADAPTER_CONFIG))
    _check_config(config, folder)
    arrays, digest = _read(_file(folder, ADAPTER_FILE))
    slots, tensors = _slots(model, names)
    _check_tensors(arrays, slots, tensors, config, folder)
    here = base or Base.of(model, "this model")
    if digest is not None and digest != here.digest:
        raise ValueError(
            f"the adapter in {folder} was trained on {config.get('base_model_name_or_path')} (digest {digest[:12]}), and "
            f"{here.name} has other weights (digest {here.digest[:12]}). Load it onto the model it belongs to; if that is cast or packed, "
            "load first and cast then, or give base=lm.Base.of(the model as it was loaded, name)"
        )
    loras = _loras(arrays, slots, config)
    model = map_nodes(lambda path, linear: loras[path](linear) if path in loras else linear, model, lambda node: isinstance(node, Linear))
    leaves: dict[str, Any] = {}
    for key in arrays.keys() & tensors.keys():
        for piece, array in zip(tensors[key], cut(arrays[key], tensors[key]), strict=True):
            leaves |= dict.fromkeys(_in_wrapper(piece.path), array)

    def filled(path: Any, leaf: Array) -> Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return jnp.asarray(leaves[name], leaf.dtype) if name in leaves else leaf

    return jax.tree_util.tree_map_with_path(filled, model)


def _file(folder: Path, name: str) -> Path:
    if (folder / name).is_file():
        return folder / name
    pickled = (folder / "adapter_model.bin").is_file()
    raise FileNotFoundError(
        f"{folder / name} does not exist: expected the folder of an adapter, {ADAPTER_CONFIG} and {ADAPTER_FILE}."
        + (" It is there as a pickle, which runs code of whoever wrote it: not read" if pickled else "")
    )


def _check_config(config: Mapping[str, Any], folder: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder} holds an adapter of type {config.get('peft_type')!r}; only LORA is known here")
    nothing: tuple[Any, ...] = (None, False, {}, [], "none")
    unknown = {name: value for name, value in config.items() if name not in _HARMLESS | _READ and value not in nothing}
    if config.get("init_lora_weights") not in _KEEPS_THE_BASE:
        unknown["init_lora_weights"] = config["init_lora_weights"]
    if unknown:
        raise ValueError(f"{folder / ADAPTER_CONFIG} has settings we do not compute: {unknown}")


def _read(file: Path) -> tuple[dict[str, np.ndarray], str | None]:
    """The tensors, by the module's name or the base's key, and the digest of the base where the file has it."""
    try:
        with safe_open(file, framework="np") as tensors:
            arrays = {key.removeprefix(_PREFIX): np.asarray(tensors.get_tensor(key)) for key in tensors.keys()}  # noqa: SIM118
            digest = (tensors.metadata() or {}).get(_DIGEST)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}): was the download or copy cut short?") from error
    return arrays, digest


_LORA_KEY = re.compile(r"(.*)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")


def _check_tensors(
    arrays: Mapping[str, np.ndarray], slots: Mapping[str, Slot], tensors: Mapping[str, list[Piece]], config: Mapping[str, Any], folder: Path
) -> None:
    """Every tensor has its place in this model, and its shape."""
    problems = []
    for key, array in arrays.items():
        match = _LORA_KEY.fullmatch(key)
        if match is None and key in tensors:
            parts = [piece.shape for piece in tensors[key]]
            if array.size != sum(int(np.prod(shape)) for shape in parts):
                problems.append(f"{key} has shape {array.shape}, here {' + '.join(map(str, parts))} (has the vocabulary grown?)")
        elif match is None or match[1] not in slots:
            problems.append(f"{key}: this model has no such module")
        else:
            d_out, d_in = sum(piece.shape[0] for piece in slots[match[1]].pieces), slots[match[1]].pieces[0].shape[1]
            rank = arrays[f"{match[1]}.lora_A.weight"].shape[0] if f"{match[1]}.lora_A.weight" in arrays else 0
            expected = {"lora_A.weight": (rank, d_in), "lora_B.weight": (d_out, rank)}.get(match[2], (d_out,))
            if array.shape != expected:
                problems.append(f"{key} has shape {array.shape}, here it would be {expected}")
    modules = {match[1] for key in arrays if (match := _LORA_KEY.fullmatch(key))}
    wanted = ("lora_A.weight", "lora_B.weight", *(["lora_magnitude_vector"] if config.get("use_dora") else []))
    problems += [f"{module}.{name} is missing" for module in sorted(modules) for name in wanted if f"{module}.{name}" not in arrays]
    if problems or not modules:
        shown = "\n  ".join(problems[:10] or ["it holds no adapter"]) + (f"\n  and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise ValueError(
            f"the adapter in {folder}, trained on {config.get('base_model_name_or_path')}, is not one for this model:\n  {shown}"
        )


def _loras(arrays: Mapping[str, np.ndarray], slots: Mapping[str, Slot], config: Mapping[str, Any]) -> dict[str, Any]:
    """For each linear map that gets one, a function that puts its adapter on it."""
    found: dict[str, Any] = {}
    for module, slot in slots.items():
        if f"{module}.lora_A.weight" not in arrays:
            continue
        down, up = (jnp.asarray(arrays[f"{module}.{name}.weight"], jnp.float32) for name in ("lora_A", "lora_B"))
        ups = cut(np.asarray(up), slot.pieces)
        magnitude = arrays.get(f"{module}.lora_magnitude_vector")
        lengths = [None] * len(ups) if magnitude is None else [part[:, 0] for part in cut(magnitude[:, None], slot.pieces)]
        alpha = _of_module(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
        settings = {"alpha": float(alpha), "rslora": bool(config.get("use_rslora")), "dropout": float(config.get("lora_dropout") or 0)}
        for path, own_up, length in zip(slot.paths, ups, lengths, strict=True):
            found[path] = _putter(jnp.array(down), jnp.asarray(own_up), None if length is None else jnp.asarray(length), settings)
    return found


def _putter(down: Array, up: Array, magnitude: Array | None, settings: Mapping[str, Any]) -> Any:
    return lambda linear: LoRA(linear, down, up, magnitude, **settings)


def _of_module(pattern: Mapping[str, float], module: str, otherwise: float) -> float:
    """As PEFT looks it up: the first name that the module's ends with, taken as a regular expression."""
    return next((value for name, value in pattern.items() if re.match(rf"(.*\.)?({name})$", module)), otherwise)
