"""SmolLM3: Llama's drawing, every fourth layer without positions (Bakouch et al. 2025, "SmolLM3: smol, multilingual, long-context
reasoner"; NoPE layers after Yang et al. 2025, arXiv:2501.18795). Block, model and names of the file are those of `lm.models.llama`.
"""

# ------------------------------------------------------------------------------------------- config

from typing import Any, ClassVar

from pydantic import Field

from lm.hf_config import ConfigReader, read_decoder, read_windows, write_decoder, write_windows
from lm.models.llama import LlamaConfig


class SmolLM3Config(LlamaConfig, frozen=True, extra="forbid"):
    """Numbers of a SmolLM3. `rope_by_layer` is no_rope_layers, whose 1 is a layer *with* positions; `window_by_layer` is sliding_window and
    layer_types."""

    model_type: ClassVar[str] = "smollm3"

    rope_base: float = Field(2_000_000.0, gt=0)  # rope_theta
    norm_eps: float = Field(1e-6, gt=0)  # rms_norm_eps
    tied: bool = True  # tie_word_embeddings

    @staticmethod
    def from_hf(config: dict[str, Any]) -> "SmolLM3Config":
        """Read a `config.json`. Each key is used, known to be harmless, or refused by name."""
        read = ConfigReader(config, "smollm3")
        numbers = read_decoder(read, context=32_768, tied=True, base=2_000_000.0)
        n_layers, interval = numbers["n_layers"], read.take("no_rope_layer_interval", 4)
        # The list goes before the interval, and may be longer than there are layers.
        rotated = read.take("no_rope_layers", None) or [(layer + 1) % interval for layer in range(n_layers)]
        with_rope = tuple(bool(each) for each in rotated[:n_layers])
        result = SmolLM3Config(
            **numbers,
            attention_bias=read.take("attention_bias", False),
            mlp_bias=read.take("mlp_bias", False),
            rope_by_layer=None if all(with_rope) else with_rope,
            window_by_layer=read_windows(read, n_layers, lambda layer: not with_rope[layer], window=None),
        )
        read.finish(harmless={"pretraining_tp", "max_window_layers"})  # in published files; this family's code reads neither
        return result

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` under which `transformers` computes the same function.

        **Raises:** `ValueError` naming the settings it has no key for.
        """
        self.refuse_all_but("attention_bias", "mlp_bias", "rope_by_layer", "window_by_layer")
        return {
            "architectures": ["SmolLM3ForCausalLM"],
            "model_type": "smollm3",
            **write_decoder(self),
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "no_rope_layers": [int(each) for each in self.rope_by_layer or (True,) * self.n_layers],
            **write_windows("smollm3", self.window_by_layer, self.n_layers),
            "bos_token_id": None,  # the tokenizer's to say; left out, transformers would take those of the published SmolLM3
            "eos_token_id": None,
            "pad_token_id": None,
        }


# ------------------------------------------------------------------------------------------- presets

# Published shapes, from each repository's config.json.
PRESETS = {
    "smollm3-3b": SmolLM3Config(
        vocab=128_256, d_model=2048, n_layers=36, n_heads=16, n_kv_heads=4, head_dim=128, d_ff=11_008, context=65_536,
        rope_base=5_000_000.0, rope_by_layer=(True, True, True, False) * 9,
    ),
}  # fmt: skip
