"""The drawings, by the name Hugging Face files know them under. A new architecture is one file beside these and one line here."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Array, Key

from lm.base import AbstractLM
from lm.hf import MAX_SHARD_BYTES, Names, Shardings, abstract, load_weights, save_folder
from lm.hf_files import CONFIG_FILE, read_json
from lm.hub import folder_of
from lm.models import gpt2, gpt_oss, llama, mixtral, olmoe, qwen3, qwen3_moe


class Architecture(NamedTuple):
    """What a file of this folder offers."""

    config: Any  # pydantic class with from_hf and to_hf
    model: Any  # AbstractLM with init(config, *, key)
    hf_names: Names  # role of a leaf → key in the file
    presets: dict[str, Any]
    current_key: Callable[[str], str | None] = lambda key: key  # of a key in an older file; None: no weight


ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture(gpt2.GPT2Config, gpt2.GPT2, gpt2.HF_NAMES, gpt2.PRESETS, gpt2.current_key),
    "gpt_oss": Architecture(gpt_oss.GptOssConfig, gpt_oss.GptOss, gpt_oss.HF_NAMES, gpt_oss.PRESETS),
    "llama": Architecture(llama.LlamaConfig, llama.Llama, llama.HF_NAMES, llama.PRESETS),
    "mixtral": Architecture(mixtral.MixtralConfig, mixtral.Mixtral, mixtral.HF_NAMES, mixtral.PRESETS),
    "olmoe": Architecture(olmoe.OlmoeConfig, olmoe.Olmoe, olmoe.HF_NAMES, olmoe.PRESETS),
    "qwen3": Architecture(qwen3.Qwen3Config, qwen3.Qwen3, qwen3.HF_NAMES, qwen3.PRESETS),
    "qwen3_moe": Architecture(qwen3_moe.Qwen3MoeConfig, qwen3_moe.Qwen3Moe, qwen3_moe.HF_NAMES, qwen3_moe.PRESETS),
}


def architecture_of(config: Any) -> Architecture:
    """The architecture a config belongs to."""
    return ARCHITECTURES[config.model_type]


def build(config: Any, *, key: Key[Array, ""]) -> AbstractLM:
    """A model with random weights."""
    return architecture_of(config).model.init(config, key=key)


def load_pretrained(source: str | Path, *, dtype: Any = None, sharding: Shardings = None, revision: str | None = None) -> AbstractLM:
    """A model with published weights.

    **Arguments:**

    - `source`: a Hugging Face folder (`config.json` and safetensors), or a repository of the Hub, `"owner/name"`, which is fetched into the
      Hub library's cache (`HF_HOME`, `HF_HUB_OFFLINE` and `HF_TOKEN` hold).
    - `dtype`: of the arrays in memory; `None` keeps the file's.
    - `sharding`: where the arrays go: one `jax.sharding.Sharding` for all, or a function from the path of each
      (`blocks/3/attn/q_proj/weight`) to its own; `None` is the default device. Each goes there as it is read: the host never holds more
      than the arrays that are its own and one tensor of the file.
    - `revision`: of a repository: a branch, a tag or a commit.

    **Raises:** `FileNotFoundError` where a file is missing; `ValueError` for a repository that cannot be had, for an architecture or a
    `config.json` key we do not know, for pickles, and for tensors that are missing, left over or of another shape, all listed at once.
    """
    folder = folder_of(source, revision)
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a Hugging Face folder with config.json and model.safetensors")
    raw = read_json(path)
    model_type = raw.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ValueError(f"{path} is of model_type {model_type!r}; known are {', '.join(sorted(ARCHITECTURES))}")
    architecture = ARCHITECTURES[model_type]
    skeleton = abstract(architecture.model.init, architecture.config.from_hf(raw))
    return load_weights(skeleton, architecture.hf_names, folder, dtype=dtype, sharding=sharding, current_key=architecture.current_key)


def save_pretrained(
    model: AbstractLM,
    folder: str | Path,
    *,
    dtype: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    extra_config: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder that `transformers` and `load_pretrained` read.

    **Arguments:**

    - `folder`: made if absent; a model in it is replaced once the new one is whole on the disk, which must have room for both.
    - `dtype`: of the arrays in the file; `None` keeps the model's.
    - `max_shard_bytes`: a larger model becomes `model-00001-of-0000N.safetensors`, ... and an index.
    - `extra_config`: further keys of `config.json`, such as `bos_token_id`.
    """
    save_folder(
        model, architecture_of(model.config).hf_names, Path(folder), dtype=dtype, max_shard_bytes=max_shard_bytes, extra_config=extra_config
    )
