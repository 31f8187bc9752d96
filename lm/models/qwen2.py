"""Qwen2 and Qwen2.5: Llama's drawing with biases on queries, keys and values, and, where asked for, a window in the upper layers (Yang et
al. 2024, arXiv:2407.10671, section 2.2). Block, model and names of the file are those of `lm.models.llama`.
"""

# ------------------------------------------------------------------------------------------- config

from typing import Any, ClassVar

from pydantic import Field

from lm.hf_config import ConfigReader, read_decoder, read_windows, write_decoder, write_windows
from lm.models.llama import LlamaConfig


class Qwen2Config(LlamaConfig, frozen=True, extra="forbid"):
    """Numbers of a Qwen2. `window_by_layer` is sliding_window, max_window_layers and layer_types."""

    model_type: ClassVar[str] = "qwen2"

    norm_eps: float = Field(1e-6, gt=0)  # rms_norm_eps
    attention_bias: bool = True  # no key: always on queries, keys and values
    attention_out_bias: bool = False  # and never on o_proj

    @staticmethod
    def from_hf(config: dict[str, Any]) -> "Qwen2Config":
        """Read a `config.json`. Each key is used, known to be harmless, or refused by name."""
        read = ConfigReader(config, "qwen2")
        numbers = read_decoder(read, context=32_768)
        first = read.take("max_window_layers", 28)
        result = Qwen2Config(**numbers, window_by_layer=read_windows(read, numbers["n_layers"], lambda layer: layer >= first, window=4096))
        read.finish(harmless={"use_mrope"})  # of Qwen2-VL, written beside; the text model has no such thing
        return result

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` under which `transformers` computes the same function.

        **Raises:** `ValueError` naming the settings it has no key for.
        """
        self.refuse_all_but("window_by_layer")
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            **write_decoder(self),
            **write_windows("qwen2", self.window_by_layer, self.n_layers),
        }


# ------------------------------------------------------------------------------------------- presets

# Published shapes, from each repository's config.json.
PRESETS = {
    "qwen2.5-0.5b": Qwen2Config(
        vocab=151_936, d_model=896, n_layers=24, n_heads=14, n_kv_heads=2, head_dim=64, d_ff=4864, context=32_768,
        rope_base=1_000_000.0, tied=True,
    ),
    "qwen2.5-1.5b": Qwen2Config(
        vocab=151_936, d_model=1536, n_layers=28, n_heads=12, n_kv_heads=2, head_dim=128, d_ff=8960, context=131_072,
        rope_base=1_000_000.0, tied=True,
    ),
}  # fmt: skip
