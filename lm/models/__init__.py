"""The drawings, by the name Hugging Face files know them under. A new architecture is one file beside these and one line here."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Array, Key

from lm import gguf
from lm.base import AbstractLM
from lm.hf import Names, abstract, load_weights, read_json, save_folder
from lm.models import gpt2, llama, qwen3


class Architecture(NamedTuple):
    """What a file of this folder offers."""

    config: Any  # pydantic class with from_hf and to_hf
    model: Any  # AbstractLM with init(config, *, key)
    hf_names: Names  # role of a leaf → key in the file
    presets: dict[str, Any]
    current_key: Callable[[str], str | None] = lambda key: key  # of a key in an older file; None: no weight


ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture(gpt2.GPT2Config, gpt2.GPT2, gpt2.HF_NAMES, gpt2.PRESETS, gpt2.current_key),
    "llama": Architecture(llama.LlamaConfig, llama.Llama, llama.HF_NAMES, llama.PRESETS),
    "qwen3": Architecture(qwen3.Qwen3Config, qwen3.Qwen3, qwen3.HF_NAMES, qwen3.PRESETS),
}


def architecture_of(config: Any) -> Architecture:
    """The architecture a config belongs to."""
    return ARCHITECTURES[config.model_type]


def build(config: Any, *, key: Key[Array, ""]) -> AbstractLM:
    """A model with random weights."""
    return architecture_of(config).model.init(config, key=key)


def load_pretrained(folder: str | Path, *, dtype: Any = None) -> AbstractLM:
    """The model in a Hugging Face folder (`config.json` and safetensors) or in a GGUF file.

    **Arguments:**

    - `folder`: where `config.json` lies, or a file that ends in `.gguf`.
    - `dtype`: of the arrays in memory; `None` keeps the file's, and dequantises those of a GGUF file to fp32.

    **Raises:** `FileNotFoundError` where a file is missing; `ValueError` for an architecture or a `config.json` key we do not know, and for
    tensors that are missing, left over or of another shape, all listed at once.
    """
    if Path(folder).suffix == ".gguf":
        return _load_gguf(Path(folder), dtype=dtype)
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a Hugging Face folder with config.json and model.safetensors")
    raw = read_json(path)
    architecture = _of_model_type(raw.get("model_type"), path)
    config = architecture.config.from_hf(raw)
    skeleton = abstract(architecture.model.init, config)
    return load_weights(skeleton, architecture.hf_names, Path(folder), dtype=dtype, current_key=architecture.current_key)


def _load_gguf(path: Path, *, dtype: Any) -> AbstractLM:
    file = gguf.open_file(path)
    raw = gguf.config_of(file)
    architecture = _of_model_type(raw["model_type"], path)
    skeleton = abstract(architecture.model.init, architecture.config.from_hf(raw))
    return gguf.load_weights(file, skeleton, architecture.hf_names, dtype=dtype)


def _of_model_type(model_type: Any, path: Path) -> Architecture:
    if model_type not in ARCHITECTURES:
        raise ValueError(f"{path} is of model_type {model_type!r}; known are {', '.join(sorted(ARCHITECTURES))}")
    return ARCHITECTURES[model_type]


def save_pretrained(model: AbstractLM, folder: str | Path, *, dtype: Any = None, extra_config: Mapping[str, Any] | None = None) -> None:
    """Write a folder that `transformers` and `load_pretrained` read.

    **Arguments:**

    - `folder`: made if absent; `config.json` and `model.safetensors` in it are replaced.
    - `dtype`: of the arrays in the file; `None` keeps the model's.
    - `extra_config`: further keys of `config.json`, such as `bos_token_id`.
    """
    save_folder(model, architecture_of(model.config).hf_names, Path(folder), dtype=dtype, extra_config=extra_config)
