"""GGUF files, those of llama.cpp, → the tree that the Hugging Face folder they were made from would give.

The metadata become its `config.json` again, and each tensor what it was in the safetensors. The converter changed three things besides the
names, and each is undone: the blocks are quantised (the `gguf` package knows how), queries and keys of `llama` have the two halves of each
rotated pair side by side, and gemma's norms have 1 added. `lm.models.load_pretrained` puts the parts together.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import rope
from lm.base import AbstractLM, leaves_by_path
from lm.hf import Names, stored_leaf

# ------------------------------------------------------------------------------------------- families


@dataclass(frozen=True)
class Family:
    """How llama.cpp's converter writes one architecture."""

    model_type: str  # of config.json
    turned: bool = False  # q and k have the two halves of each rotated pair side by side
    norms_plus_one: bool = False
    tensors: Mapping[str, str] = field(default_factory=dict)  # names of a layer that are not as in `_LAYER`
    keys: Mapping[str, str] = field(default_factory=dict)  # metadata beyond those of `_KEYS` → config.json
    scale_from_heads: int | None = None  # the depth at which scores are divided by √(d_model / n_heads) and not by √head_dim


_SANDWICH = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_WINDOWS = {"attention.sliding_window": "sliding_window"}
_SOFTCAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}

# general.architecture → how it is read. What scores of Gemma's 27B models are divided by no file says: llama.cpp knows them by depth.
FAMILIES: dict[str, Family] = {
    "llama": Family("llama", turned=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma": Family("gemma", norms_plus_one=True),
    "gemma2": Family("gemma2", norms_plus_one=True, tensors=_SANDWICH, keys=_WINDOWS | _SOFTCAPS, scale_from_heads=46),
    "gemma3": Family(
        "gemma3_text",
        norms_plus_one=True,
        tensors=_SANDWICH,
        keys=_WINDOWS | {"rope.freq_base_swa": "rope_local_base_freq", "final_logit_softcapping": "final_logit_softcapping"},
        scale_from_heads=62,
    ),
}

# Metadata behind the architecture's name → config.json.
_KEYS = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
# Those that say what is computed anyway; with any other value they are refused.
_NEUTRAL = {
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scaling.attn_factor": 1.0,
    "tensor_data_layout": "Meta AI original pth",
}
_HARMLESS = {"rope.scaling.finetuned"}

_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ROPE_FACTORS = "rope_freqs.weight"  # what llama.cpp divides the frequencies by

# ------------------------------------------------------------------------------------------- file


@dataclass(frozen=True)
class GGUF:
    """An open file: metadata in Python's types, tensors still on the disk."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Any]  # name → gguf.ReaderTensor, mapped into memory

    @property
    def family(self) -> Family:
        architecture = self.metadata.get("general.architecture")
        if architecture not in FAMILIES:
            raise ValueError(f"{self.path} is of architecture {architecture!r}; known are {', '.join(FAMILIES)}")
        return FAMILIES[architecture]

    def shape(self, name: str) -> tuple[int, ...]:
        """As our leaves have it; ggml counts axes from the other end."""
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def read(self, name: str) -> np.ndarray:
        """The numbers of one tensor, dequantised to fp32.

        **Raises:** `ValueError` for a type that the `gguf` package does not dequantise.
        """
        import gguf  # the extra

        tensor = self.tensors[name]
        try:
            numbers = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"{self.path} holds {name} as {tensor.tensor_type.name}, which the gguf package does not dequantise: quantise it anew"
            ) from error
        return numbers.astype(np.float32, copy=False).reshape(self.shape(name))


def open_file(path: Path) -> GGUF:
    """Read the metadata and find the tensors.

    **Raises:** `FileNotFoundError`; `ValueError` for what is no whole GGUF file of a language model, and without the extra `gguf`.
    """
    try:
        import gguf  # an extra: most who load models never meet such a file
    except ModuleNotFoundError as error:
        raise ValueError(f"reading {path} needs the gguf package, which is not installed: run `uv sync --extra gguf`") from error
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a GGUF file")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(f"{path} is not a GGUF file: it begins with {magic!r}, expected b'GGUF'")
    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: value.contents() for key, value in reader.fields.items() if not key.startswith("GGUF.")}
    except (ValueError, IndexError, KeyError) as error:  # all of them mean that bytes are missing or are others
        raise ValueError(f"{path} is not a whole GGUF file ({error}): was the download or copy cut short?") from error
    if reader.byte_order != "I":
        raise ValueError(f"{path} has its bytes in the order of another machine: run gguf-convert-endian on it")
    kind, parts = metadata.get("general.type", "model"), metadata.get("split.count", 1)
    if kind != "model":
        raise ValueError(f"{path} is of general.type {kind!r}: expected 'model'")
    if parts > 1:
        raise ValueError(f"{path} is one of {parts} parts: join them with `llama-gguf-split --merge` first")
    return GGUF(path, metadata, {tensor.name: tensor for tensor in reader.tensors})


# ------------------------------------------------------------------------------------------- config


def config_of(file: GGUF) -> dict[str, Any]:
    """The `config.json` of the model in the file. Each of the architecture's metadata is used, known to be harmless, or refused by name."""
    family, prefix = file.family, f"{file.metadata['general.architecture']}."
    left = {key.removeprefix(prefix): _shortest(value) for key, value in file.metadata.items() if key.startswith(prefix)}
    lists = sorted(key for key, value in left.items() if isinstance(value, list))
    if lists:
        raise ValueError(f"{file.path} has a number for each layer in {', '.join(prefix + key for key in lists)}: expected one for all")
    config = {ours: left.pop(theirs) for theirs, ours in (_KEYS | dict(family.keys)).items() if theirs in left}
    lacking = [prefix + key for key in ("block_count", "embedding_length", "attention.head_count") if _KEYS[key] not in config]
    if lacking or "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path} lacks {', '.join(lacking or ['the tensor token_embd.weight'])}: is it whole?")

    d_model, n_heads = config["hidden_size"], config["num_attention_heads"]
    widths = {key: left.pop(f"attention.{key}", None) for key in ("key_length", "value_length")}
    rotated = left.pop("rope.dimension_count", None)
    head_dim = next(width for width in (widths["key_length"], rotated, d_model // n_heads) if width is not None)
    if {*widths.values(), rotated} - {None, head_dim}:
        raise ValueError(
            f"{file.path} has heads of {head_dim} with attention.value_length {widths['value_length']} and rope.dimension_count {rotated}: "
            "expected all three equal. Loading it anyway would give another function"
        )
    config.setdefault("vocab_size", file.shape("token_embd.weight")[0])
    config |= {"model_type": family.model_type, "head_dim": head_dim, "tie_word_embeddings": "output.weight" not in file.tensors}
    if family.model_type in ("llama", "qwen3"):  # the others have theirs always, or never
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if family.scale_from_heads is not None:
        config["query_pre_attn_scalar"] = d_model // n_heads if config["num_hidden_layers"] == family.scale_from_heads else head_dim
    if family.model_type == "gemma3_text" and "sliding_window" not in config:  # the converter is silent where all layers see everything
        config["sliding_window_pattern"] = 1
    window = left.get("attention.sliding_window")
    if family.model_type == "llama" and window is not None:  # Mistral is written as llama
        del left["attention.sliding_window"]
        if window < config["max_position_embeddings"]:
            config |= {"model_type": "mistral", "sliding_window": window}
            del config["attention_bias"]
    scaling = _rope_scaling(file, left, head_dim, config.get("rope_theta", 10_000.0))
    if scaling is not None:
        config["rope_scaling"] = scaling

    unknown = {
        prefix + key: value for key, value in left.items() if key not in _HARMLESS and not (key in _NEUTRAL and value == _NEUTRAL[key])
    }
    if unknown:
        raise ValueError(f"{file.path} has metadata that we do not compute: {unknown}. Loading it anyway would give another function")
    return config


def _shortest(value: Any) -> Any:
    """A float as it was before it was kept in fp32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _rope_scaling(file: GGUF, left: dict[str, Any], head_dim: int, base: float) -> dict[str, Any] | None:
    """What stretches the positions, out of the metadata and the tensor of factors; takes the keys it uses out of `left`."""
    kind = left.pop("rope.scaling.type", "none")
    if ROPE_FACTORS in file.tensors:
        return _llama3(file, head_dim, base)
    if kind == "none":
        return None
    names = {"factor": "factor"}
    if kind == "yarn":
        names |= {
            "original_context_length": "original_max_position_embeddings",
            "yarn_beta_fast": "beta_fast",
            "yarn_beta_slow": "beta_slow",
        }
    elif kind != "linear":
        raise ValueError(f"{file.path} asks for RoPE scaling of type {kind!r}; known are none, linear, yarn and the factors of Llama 3")
    given = {ours: left.pop(f"rope.scaling.{theirs}") for theirs, ours in names.items() if f"rope.scaling.{theirs}" in left}
    if "factor" not in given:
        raise ValueError(f"{file.path} asks for RoPE scaling of type {kind!r} without a rope.scaling.factor")
    return {"rope_type": kind} | given


def _llama3(file: GGUF, head_dim: int, base: float) -> dict[str, Any] | None:
    """Llama 3's scaling (`lm.rope.Llama3`). The file keeps what came out, not the four numbers: the factor is the largest, and the other
    three are those of all published models, or what comes out is not the same and is refused."""
    factors = file.read(ROPE_FACTORS)
    if np.all(factors == 1):
        return None
    kind = rope.Llama3(factor=max(_shortest(float(factors.max())), 1.0), low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
    plain = rope.frequencies(head_dim, base)
    expected = np.asarray(plain / rope.llama3(plain, kind))
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise ValueError(f"{file.path} has a {ROPE_FACTORS} that is not the scaling of Llama 3.1 to 3.3: {factors.tolist()}")
    numbers = kind.model_dump(include={"factor", "low_freq_factor", "high_freq_factor"})
    return {"rope_type": "llama3", "original_max_position_embeddings": kind.original_context} | numbers


# ------------------------------------------------------------------------------------------- weights


def gguf_name(key: str, family: Family) -> str:
    """The converter's name of a tensor: `model.layers.3.self_attn.q_proj.weight` → `blk.3.attn_q.weight`."""
    module, _, kind = key.rpartition(".")
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    if layer is None:
        return f"{_TOP[module]}.{kind}"
    return f"blk.{layer[1]}.{(_LAYER | dict(family.tensors))[layer[2]]}.{kind}"


def load_weights(
    file: GGUF, skeleton: AbstractLM, names: Names, *, dtype: Any = None, place: Callable[[np.ndarray, str], jax.Array] | None = None
) -> AbstractLM:
    """Fill an abstract tree, one tensor at a time: the most that is held is the arrays as they will be, and one tensor in fp32.

    **Arguments:**

    - `names`: the family's own table, role → key of the Hugging Face file.
    - `dtype`: of the arrays; `None` is fp32, to which blocks dequantise.
    - `place`: puts an array, with its path, where it belongs; `None` is the default device.

    **Raises:** `ValueError` listing every tensor that is missing, left over, or of another shape.
    """
    wanted = {}
    for path, leaf in leaves_by_path(skeleton).items():
        key = stored_leaf(path, names).key
        wanted[gguf_name(key, file.family)] = (path, key, leaf)
    problems = [f"missing: {name} {leaf.shape}" for name, (_, _, leaf) in wanted.items() if name not in file.tensors]
    problems += [f"left over: {name}" for name in file.tensors if name not in wanted and name != ROPE_FACTORS]
    problems += [
        f"shape: {name} is {file.shape(name)}, expected {leaf.shape}"
        for name, (_, _, leaf) in wanted.items()
        if name in file.tensors and file.shape(name) != leaf.shape
    ]
    if problems:
        raise ValueError(f"{file.path} does not hold the model its metadata describe:\n  " + "\n  ".join(problems))
    loaded = {}
    for name, (path, key, _) in wanted.items():
        array = _undone(file.read(name), key, file.family, skeleton.config).astype(np.float32 if dtype is None else dtype)
        loaded[path] = jnp.asarray(array) if place is None else place(array, path)
    return jax.tree.unflatten(jax.tree.structure(skeleton), [loaded[path] for path in leaves_by_path(skeleton)])


def _undone(tensor: np.ndarray, key: str, family: Family, config: Any) -> np.ndarray:
    """The tensor as it was before the converter changed its numbers."""
    if family.turned and re.search(r"\.[qk]_proj\.", key):
        # Rows of a head (0, h, 1, h + 1, ...), h = head_dim / 2, go back to (0, 1, ..., h, h + 1, ...).
        pairs = tensor.reshape(-1, config.head_dim // 2, 2, *tensor.shape[1:])
        return pairs.swapaxes(1, 2).reshape(tensor.shape)
    return tensor - 1 if family.norms_plus_one and key.endswith("norm.weight") else tensor
