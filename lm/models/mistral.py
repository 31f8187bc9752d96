"""Mistral: Llama's drawing, every layer seeing a window of the last few thousand tokens (Jiang et al. 2023, arXiv:2310.06825). Block, model
and names of the file are those of `lm.models.llama`.
"""

# ------------------------------------------------------------------------------------------- config

from typing import Any, ClassVar

from lm.hf_config import ConfigReader, read_decoder, window_of_all, write_decoder
from lm.models.llama import LlamaConfig


class MistralConfig(LlamaConfig, frozen=True, extra="forbid"):
    """Numbers of a Mistral: a Llama without biases. `window_by_layer` has one number for all layers, or is absent, as since Mistral
    7B v0.2."""

    model_type: ClassVar[str] = "mistral"

    @staticmethod
    def from_hf(config: dict[str, Any]) -> "MistralConfig":
        """Read a `config.json`. Each key is used, known to be harmless, or refused by name."""
        read = ConfigReader(config, "mistral")
        numbers = read_decoder(read, context=131_072)
        window = read.take_or_null("sliding_window", 4096)
        result = MistralConfig(**numbers, window_by_layer=None if window is None else (window,) * numbers["n_layers"])
        read.finish(harmless=set())
        return result

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` under which `transformers` computes the same function.

        **Raises:** `ValueError` naming the settings it has no key for.
        """
        self.refuse_all_but("window_by_layer")
        return {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            **write_decoder(self),
            "sliding_window": window_of_all("mistral", self.window_by_layer),
        }


# ------------------------------------------------------------------------------------------- presets

# Published shapes, from each repository's config.json.
PRESETS = {
    "mistral-7b-v0.1": MistralConfig(
        vocab=32_000, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, d_ff=14_336, context=32_768,
        window_by_layer=(4096,) * 32,
    ),
    "mistral-7b-v0.3": MistralConfig(
        vocab=32_768, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, d_ff=14_336, context=32_768,
        rope_base=1_000_000.0,
    ),
}  # fmt: skip
