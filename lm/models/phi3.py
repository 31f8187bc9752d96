"""Phi-3, Phi-3.5 and Phi-4: Llama's drawing, with LongRoPE in the models of long context, and files that keep queries, keys and values as
one tensor, gate and up as another (Abdin et al. 2024, arXiv:2404.14219, section 2). Block and model are those of `lm.models.llama`.
"""

# ------------------------------------------------------------------------------------------- config

from typing import Any, ClassVar

from lm import rope
from lm.hf import Names, part
from lm.hf_config import ConfigReader, read_decoder, window_of_all, write_decoder
from lm.models import llama


class Phi3Config(llama.LlamaConfig, frozen=True, extra="forbid"):
    """Numbers of a Phi-3: a Llama without biases. `window_by_layer` has one number for all layers, or is absent; `rope_fraction` is
    partial_rotary_factor; `dropout` is resid_pdrop and embd_pdrop."""

    model_type: ClassVar[str] = "phi3"

    @staticmethod
    def from_hf(config: dict[str, Any]) -> "Phi3Config":
        """Read a `config.json`. Each key is used, known to be harmless, or refused by name."""
        read = ConfigReader(_with_longrope_named(config), "phi3")
        original = read.take("original_max_position_embeddings", 4096)
        numbers = read_decoder(read, context=4096, norm_eps=1e-5, fraction=1.0, original_context=original)
        window = read.take("sliding_window", None)
        dropout = read.take("resid_pdrop", 0.0)
        result = Phi3Config(**numbers, window_by_layer=None if window is None else (window,) * numbers["n_layers"], dropout=dropout)
        read.expect("embd_pdrop", dropout, default=dropout)
        for name in ("attention_bias", "mlp_bias", "lm_head_bias"):
            read.expect(name, False, default=False)
        _refuse_other_rope(result.rope_scaling)
        # Where the authors' own code lies, and two numbers of Phi-4-mini that neither it nor transformers reads.
        read.finish(harmless={"auto_map", "full_attn_mod", "interpolate_factor"})
        return result

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` under which `transformers` computes the same function.

        **Raises:** `ValueError` naming the settings it has no key for.
        """
        self.refuse_all_but("window_by_layer")
        _refuse_other_rope(self.rope_scaling)
        written = write_decoder(self, fraction_key="partial_rotary_factor")
        if isinstance(self.rope_scaling, rope.LongRope):
            # Older versions know these three keys and no others; `factor` is context / original context where it is not given.
            scaling = written["rope_scaling"]
            written["original_max_position_embeddings"] = scaling.pop("original_max_position_embeddings")
            if scaling["factor"] == self.context / self.rope_scaling.original_context:
                del scaling["factor"]
            scaling["type"] = scaling.pop("rope_type")
        return {
            "architectures": ["Phi3ForCausalLM"],
            "model_type": "phi3",
            **written,
            "sliding_window": window_of_all("phi3", self.window_by_layer),
            "resid_pdrop": self.dropout,
            "embd_pdrop": self.dropout,
            "bos_token_id": None,  # the tokenizer's to say; left out, transformers would take those of the published Phi-3
            "eos_token_id": None,
            "pad_token_id": None,
        }


def _with_longrope_named(config: dict[str, Any]) -> dict[str, Any]:
    """The first files called LongRoPE "su", or "yarn", which it is not: such they are to transformers' phi3 too."""
    config = dict(config)
    for name in ("rope_scaling", "rope_parameters"):
        found = config.get(name) or {}
        for kind in ("type", "rope_type"):
            if found.get(kind) in ("su", "yarn"):
                config[name] = found = found | {kind: "longrope"}
    return config


def _refuse_other_rope(scaling: rope.Scaling | None) -> None:
    if not isinstance(scaling, rope.LongRope | rope.NTK | None):  # NTK is written as another base
        raise ValueError(f"the phi3 of transformers knows RoPE of type default and longrope only; got {scaling!r}")


# ------------------------------------------------------------------------------------------- presets

# Published shapes, from each repository's config.json. Those of long context have lists of factors, which come with the weights.
PRESETS = {
    "phi-3-mini-4k": Phi3Config(
        vocab=32_064, d_model=3072, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=96, d_ff=8192, context=4096,
        window_by_layer=(2047,) * 32,
    ),
}  # fmt: skip

# ------------------------------------------------------------------------------------------- HF names

# role of our leaf → key in the file; {i} is the layer.
HF_NAMES: Names = llama.HF_NAMES | {
    "attn.q_proj.weight": part(0, "model.layers.{i}.self_attn.qkv_proj.weight"),
    "attn.k_proj.weight": part(1, "model.layers.{i}.self_attn.qkv_proj.weight"),
    "attn.v_proj.weight": part(2, "model.layers.{i}.self_attn.qkv_proj.weight"),
    "mlp.gate_proj.weight": part(0, "model.layers.{i}.mlp.gate_up_proj.weight"),
    "mlp.up_proj.weight": part(1, "model.layers.{i}.mlp.gate_up_proj.weight"),
}
