"""The drawings, by the name Hugging Face files know them under. A new architecture is one file beside these and one line here."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Array, Key

from lm.base import AbstractLM
from lm.hf import Names, abstract, load_weights, read_json, save_folder
from lm.models import gemma, gemma2, gemma3, gpt2, llama, olmo2, qwen3


class Architecture(NamedTuple):
    """What a file of this folder offers."""

    config: Any  # pydantic class with from_hf and to_hf
    model: Any  # AbstractLM with init(config, *, key)
    hf_names: Names  # role of a leaf → key in the file
    presets: dict[str, Any]
    current_key: Callable[[str], str | None] = lambda key: key  # of a key in an older file; None: no weight


ARCHITECTURES: dict[str, Architecture] = {
    "gemma": Architecture(gemma.GemmaConfig, gemma.Gemma, gemma.HF_NAMES, gemma.PRESETS),
    "gemma2": Architecture(gemma2.Gemma2Config, gemma2.Gemma2, gemma2.HF_NAMES, gemma2.PRESETS),
    "gemma3_text": Architecture(gemma3.Gemma3Config, gemma3.Gemma3, gemma3.HF_NAMES, gemma3.PRESETS),
    "gpt2": Architecture(gpt2.GPT2Config, gpt2.GPT2, gpt2.HF_NAMES, gpt2.PRESETS, gpt2.current_key),
    "llama": Architecture(llama.LlamaConfig, llama.Llama, llama.HF_NAMES, llama.PRESETS),
    "olmo2": Architecture(olmo2.Olmo2Config, olmo2.Olmo2, olmo2.HF_NAMES, olmo2.PRESETS),
    "olmo3": Architecture(olmo2.Olmo3Config, olmo2.Olmo2, olmo2.HF_NAMES, olmo2.OLMO3_PRESETS),
    "qwen3": Architecture(qwen3.Qwen3Config, qwen3.Qwen3, qwen3.HF_NAMES, qwen3.PRESETS),
}


def architecture_of(config: Any) -> Architecture:
    """The architecture a config belongs to."""
    return ARCHITECTURES[config.model_type]


def build(config: Any, *, key: Key[Array, ""]) -> AbstractLM:
    """A model with random weights."""
    return architecture_of(config).model.init(config, key=key)


def load_pretrained(folder: str | Path, *, dtype: Any = None) -> AbstractLM:
    """The model in a Hugging Face folder (`config.json` and safetensors).

    **Arguments:**

    - `folder`: where `config.json` lies.
    - `dtype`: of the arrays in memory; `None` keeps the file's.

    **Raises:** `FileNotFoundError` where a file is missing; `ValueError` for an architecture or a `config.json` key we do not know, and for
    tensors that are missing, left over or of another shape, all listed at once.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a Hugging Face folder with config.json and model.safetensors")
    raw = read_json(path)
    model_type = raw.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ValueError(f"{path} is of model_type {model_type!r}; known are {', '.join(sorted(ARCHITECTURES))}")
    architecture = ARCHITECTURES[model_type]
    config = architecture.config.from_hf(raw)
    skeleton = abstract(architecture.model.init, config)
    return load_weights(skeleton, architecture.hf_names, Path(folder), dtype=dtype, current_key=architecture.current_key)


def save_pretrained(model: AbstractLM, folder: str | Path, *, dtype: Any = None, extra_config: Mapping[str, Any] | None = None) -> None:
    """Write a folder that `transformers` and `load_pretrained` read.

    **Arguments:**

    - `folder`: made if absent; `config.json` and `model.safetensors` in it are replaced.
    - `dtype`: of the arrays in the file; `None` keeps the model's.
    - `extra_config`: further keys of `config.json`, such as `bos_token_id`.
    """
    save_folder(model, architecture_of(model.config).hf_names, Path(folder), dtype=dtype, extra_config=extra_config)
