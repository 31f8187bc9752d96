"""A model written as llama.cpp's converter writes it: the opposite of what `lm.gguf` undoes, from the description of the format."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

import lm
from lm.base import leaves_by_path
from lm.hf import stored_leaf
from lm.models import architecture_of

LAYER = {
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
SANDWICH = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
ARCHITECTURE = {"mistral": "llama", "gemma3_text": "gemma3"}  # where it is not the model_type


def side_by_side(rows: np.ndarray, heads: int) -> np.ndarray:
    """Row i of the first half of each head beside row i of its second half."""
    first, second = np.split(rows.reshape(heads, -1, *rows.shape[1:]), 2, axis=1)
    return np.stack([first, second], axis=2).reshape(rows.shape)


def tensors_of(model: Any) -> dict[str, np.ndarray]:
    """The tensors as the converter writes them, in fp32."""
    config, names = model.config, architecture_of(model.config).hf_names
    architecture = ARCHITECTURE.get(config.model_type, config.model_type)
    found = {}
    for path, leaf in leaves_by_path(model).items():
        key, array = stored_leaf(path, names).key, np.asarray(leaf)
        if architecture == "llama" and ("q_proj" in key or "k_proj" in key):
            array = side_by_side(array, config.n_heads if "q_proj" in key else config.n_kv_heads)
        if architecture.startswith("gemma") and key.endswith("norm.weight"):
            array = array + 1
        if key in TOP:
            found[TOP[key]] = array
        else:
            _, _, layer, *module, kind = key.split(".")
            layer_names = LAYER | (SANDWICH if architecture in ("gemma2", "gemma3") else {})
            found[f"blk.{layer}.{layer_names['.'.join(module)]}.{kind}"] = array
    return found


def metadata_of(config: Any) -> dict[str, Any]:
    """What the converter says of a config, behind the name of the architecture: which layers have a window it does not say."""
    architecture = ARCHITECTURE.get(config.model_type, config.model_type)
    said = {
        "context_length": config.context,
        "block_count": config.n_layers,
        "embedding_length": config.d_model,
        "feed_forward_length": config.d_ff,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": config.rope_base,
    }
    if architecture in ("gemma", "gemma2"):
        del said["rope.freq_base"]  # 10,000 without a word
    if architecture in ("gemma2", "gemma3"):
        said |= {"attention.sliding_window": config.window, "final_logit_softcapping": config.logit_softcap}
    if architecture == "gemma2":
        said["attn_logit_softcapping"] = config.attention_softcap
    if architecture == "gemma3":
        said["rope.freq_base_swa"] = config.rope_base_local
    return {key: value for key, value in said.items() if value is not None}


def write(
    path: Path, architecture: str, metadata: dict[str, Any], tensors: dict[str, np.ndarray], *, kinds: dict[str, str] | None = None
) -> Path:
    """`metadata` with their whole names, or behind the architecture's where they do not begin with `general.`, `tokenizer.` or `split.`.
    `kinds` says how some tensors are quantised, or already are where they are bytes."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        name = key if key.split(".")[0] in ("general", "tokenizer", "split") else f"{architecture}.{key}"
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        add[type(value)](name, value)
    for name, array in tensors.items():
        if name in (kinds or {}):
            kind = gguf.GGMLQuantizationType[kinds[name]]
            writer.add_tensor(name, array if array.dtype == np.uint8 else gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(path: Path, model: lm.AbstractLM, metadata: dict[str, Any] | None = None, **options: Any) -> Path:
    """The whole model; an entry of `metadata` that is `None` is left out."""
    architecture = ARCHITECTURE.get(model.config.model_type, model.config.model_type)
    said = metadata_of(model.config) | (metadata or {})
    return write(path, architecture, {key: value for key, value in said.items() if value is not None}, tensors_of(model), **options)
