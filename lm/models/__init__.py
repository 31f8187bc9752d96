"""The drawings, by the name Hugging Face files know them under. A new architecture is one file beside these and one line here."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
from jaxtyping import Array, Key

from lm import adapter_files, gguf, native
from lm.adapter_files import Base
from lm.adapters import LoRA
from lm.base import AbstractLM
from lm.hf import MAX_SHARD_BYTES, Names, Shardings, abstract, load_weights, save_folder
from lm.hf_files import CONFIG_FILE, read_json
from lm.hub import folder_of
from lm.models import (
    gemma,
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    gpt_oss,
    granite,
    llama,
    mistral,
    mixtral,
    olmo2,
    olmoe,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
    zmaj,
)
from lm.quant import Quantised

Model = TypeVar("Model", bound=AbstractLM)


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
    "gpt_neox": Architecture(gpt_neox.GPTNeoXConfig, gpt_neox.GPTNeoX, gpt_neox.HF_NAMES, gpt_neox.PRESETS, gpt_neox.current_key),
    "gpt_oss": Architecture(gpt_oss.GptOssConfig, gpt_oss.GptOss, gpt_oss.HF_NAMES, gpt_oss.PRESETS),
    "granite": Architecture(granite.GraniteConfig, granite.Granite, granite.HF_NAMES, granite.PRESETS),
    "llama": Architecture(llama.LlamaConfig, llama.Llama, llama.HF_NAMES, llama.PRESETS, llama.current_key),
    "mistral": Architecture(mistral.MistralConfig, llama.Llama, llama.HF_NAMES, mistral.PRESETS),
    "mixtral": Architecture(mixtral.MixtralConfig, mixtral.Mixtral, mixtral.HF_NAMES, mixtral.PRESETS),
    "olmo2": Architecture(olmo2.Olmo2Config, olmo2.Olmo2, olmo2.HF_NAMES, olmo2.PRESETS),
    "olmo3": Architecture(olmo2.Olmo3Config, olmo2.Olmo2, olmo2.HF_NAMES, olmo2.OLMO3_PRESETS),
    "olmoe": Architecture(olmoe.OlmoeConfig, olmoe.Olmoe, olmoe.HF_NAMES, olmoe.PRESETS),
    "phi3": Architecture(phi3.Phi3Config, llama.Llama, phi3.HF_NAMES, phi3.PRESETS),
    "qwen2": Architecture(qwen2.Qwen2Config, llama.Llama, llama.HF_NAMES, qwen2.PRESETS),
    "qwen3": Architecture(qwen3.Qwen3Config, qwen3.Qwen3, qwen3.HF_NAMES, qwen3.PRESETS),
    "qwen3_moe": Architecture(qwen3_moe.Qwen3MoeConfig, qwen3_moe.Qwen3Moe, qwen3_moe.HF_NAMES, qwen3_moe.PRESETS),
    "smollm3": Architecture(smollm3.SmolLM3Config, llama.Llama, llama.HF_NAMES, smollm3.PRESETS),
    "zmaj": Architecture(zmaj.ZmajConfig, zmaj.Zmaj, zmaj.HF_NAMES, zmaj.PRESETS),
}
NATIVE = frozenset({native.MODEL_TYPE})  # drawings of our own, which no file of another library is read as


def architecture_of(config: Any) -> Architecture:
    """The architecture a config belongs to."""
    return ARCHITECTURES[config.model_type]


def build(config: Any, *, key: Key[Array, ""]) -> AbstractLM:
    """A model with random weights."""
    return architecture_of(config).model.init(config, key=key)


def load_pretrained(source: str | Path, *, dtype: Any = None, sharding: Shardings = None, revision: str | None = None) -> AbstractLM:
    """A model with published weights.

    **Arguments:**

    - `source`: a Hugging Face folder (`config.json` and safetensors), or one of ours (`save_native`); a repository of the Hub,
      `"owner/name"`, which is fetched into the Hub library's cache (`HF_HOME`, `HF_HUB_OFFLINE` and `HF_TOKEN` hold); or a file that ends
      in `.gguf`.
    - `dtype`: of the arrays in memory; `None` keeps the file's, and dequantises those of a GGUF file to fp32. Packed weights stay packed,
      and are multiplied in it.
    - `sharding`: where the arrays go: one `jax.sharding.Sharding` for all, or a function from the path of each
      (`blocks/3/attn/q_proj/weight`) to its own; `None` is the default device. Each goes there as it is read: the host never holds more
      than the arrays that are its own and one tensor of the file. GGUF files take none.
    - `revision`: of a repository: a branch, a tag or a commit.

    **Raises:** `FileNotFoundError` where a file is missing; `ValueError` for a repository that cannot be had, for an architecture or a
    `config.json` key we do not know, for pickles, and for tensors that are missing, left over or of another shape, all listed at once.
    """
    if Path(source).suffix == ".gguf":
        if sharding is not None or revision is not None:
            raise ValueError(
                f"{source} is a GGUF file, which takes neither a sharding nor a revision; save_pretrained makes a folder of it"
            )
        return _load_gguf(Path(source), dtype=dtype)
    folder = folder_of(source, revision)
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a Hugging Face folder with config.json and model.safetensors")
    raw = read_json(path)
    if raw.get("model_type") == native.MODEL_TYPE:
        return native.load_native(raw, ARCHITECTURES, folder, dtype=dtype, sharding=sharding)
    architecture = _of_model_type(raw.get("model_type"), path)
    skeleton = abstract(architecture.model.init, architecture.config.from_hf(raw))
    return load_weights(skeleton, architecture.hf_names, folder, dtype=dtype, sharding=sharding, current_key=architecture.current_key)


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


def save_pretrained(
    model: AbstractLM,
    folder: str | Path,
    *,
    dtype: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    extra_config: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder that `transformers` and `load_pretrained` read. Packed weights, and settings `transformers` does not know, go into a
    folder of ours (`save_native`).

    **Arguments:**

    - `folder`: made if absent; a model in it is replaced once the new one is whole on the disk, which must have room for both.
    - `dtype`: of the arrays in the file; `None` keeps the model's.
    - `max_shard_bytes`: a larger model becomes `model-00001-of-0000N.safetensors`, ... and an index.
    - `extra_config`: further keys of `config.json`, such as `bos_token_id`.

    **Raises:** `ValueError` for a model `transformers` could not compute under its name, and for packed weights and adapters.
    """
    odd = [node for node in jax.tree.leaves(model, is_leaf=_is_odd) if _is_odd(node)]
    if odd:
        way = (
            "lm.save_native keeps them as they are, lm.dequantised makes arrays of them"
            if isinstance(odd[0], Quantised)
            else "merge them, or lm.save_adapter keeps them"
        )
        raise ValueError(f"a folder for transformers holds plain matrices, and {len(odd)} of this model are {type(odd[0]).__name__}: {way}")
    save_folder(
        model, architecture_of(model.config).hf_names, Path(folder), dtype=dtype, max_shard_bytes=max_shard_bytes, extra_config=extra_config
    )


def _is_odd(node: Any) -> bool:
    return isinstance(node, Quantised | LoRA)


def save_native(
    model: AbstractLM,
    folder: str | Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    extra_config: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder that `load_pretrained` reads and nobody takes for another's (`lm.native`): packed weights as they are, and any setting
    a config has. The arguments are those of `save_pretrained`.

    **Raises:** `ValueError` for a model with adapters.
    """
    native.save_native(model, Path(folder), max_shard_bytes=max_shard_bytes, extra_config=extra_config)


def save_adapter(model: AbstractLM, folder: str | Path, *, base: Base, also: Sequence[str] = ()) -> None:
    """Write the adapters of a model as PEFT keeps them: `adapter_model.safetensors` (fp32) and `adapter_config.json`.

    **Arguments:**

    - `base`: the model they belong to, `lm.Base.of(model, name)` taken when it was loaded: its name goes into the config, its digest into
      the metadata of the tensors.
    - `also`: roles or paths of what was trained beside them, as given to `trainable_filter`; the whole module of each is written, as PEFT's
      `modules_to_save`.

    **Raises:** `ValueError` for a model without adapters, and for adapters PEFT cannot tell of: rsLoRA or DoRA on some only.
    """
    adapter_files.save_adapter(model, architecture_of(model.config).hf_names, Path(folder), base=base, also=also)


def load_adapter(model: Model, folder: str | Path, *, base: Base | None = None) -> Model:
    """The model with the adapters of a folder: written by `save_adapter` or by PEFT.

    **Arguments:**

    - `base`: what `model` was before it was cast or packed; `None`: it is as it was loaded. Looked at where the file has a digest; PEFT
      itself writes none, and then names and shapes have to do.

    **Raises:** `FileNotFoundError` where a file is missing; `ValueError` for another base, for tensors this model has no place for, and for
    settings that are not LoRA's, rsLoRA's or DoRA's.
    """
    return adapter_files.load_adapter(model, architecture_of(model.config).hf_names, Path(folder), base=base)
