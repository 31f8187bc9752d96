"""gpt-oss: experts with a clamped gate, attention with a sink a head, every other layer in a window (OpenAI 2025, arXiv:2508.10925).

x ─┬─ norm ─ attention with sinks ─(+)─┬─ norm ─ router ─ experts ─(+)─ …  norm ─ unembed
   └───────────────────────────────────┘└────────────────────────────┘

Block and model are those of `lm/models/mixtral.py`. Published files hold the experts' matrices as MXFP4; they are unpacked as they are
loaded, and saved as they then are.
"""

# ------------------------------------------------------------------------------------------- config

from typing import Any, ClassVar

import jax.random as jr
import numpy as np
from jaxtyping import Array, Key
from pydantic import Field, model_validator

from lm.attention import Attention
from lm.hf import Names, packed, part, transposed
from lm.hf_config import ConfigReader
from lm.models.mixtral import SHARED_NAMES, AbstractSparse, Block, SparseConfig, out_std, read_shared, write_shared
from lm.moe import ClampedSwiGLU, Experts, MoE, Router
from lm.quant import from_mxfp4
from lm.rope import Yarn


class GptOssConfig(SparseConfig, frozen=True, extra="forbid"):
    """Numbers of a gpt-oss."""

    model_type: ClassVar[str] = "gpt_oss"

    window: int = Field(gt=0)  # positions a query sees in the layers that slide, itself included; sliding_window
    sliding: tuple[bool, ...]  # for each layer, whether it has the window; layer_types
    attention_bias: bool = True  # attention_bias
    swiglu_alpha: float = Field(1.702, gt=0)  # swiglu_alpha
    swiglu_limit: float = Field(7.0, gt=0)  # swiglu_limit

    @model_validator(mode="after")
    def _every_layer_is_told(self) -> "GptOssConfig":
        if len(self.sliding) != self.n_layers:
            raise ValueError(f"sliding must be {self.n_layers} of True and False, one for each of n_layers; got {self.sliding}")
        return self

    @staticmethod
    def from_hf(config: dict[str, Any]) -> "GptOssConfig":
        """Read a `config.json`. Each key is used, known to be harmless, or refused by name."""
        read = ConfigReader(config, "gpt_oss")
        if not any(config.get(name) for name in ("rope_parameters", "rope_scaling")):
            raise ValueError(
                "config.json of a gpt_oss has neither rope_parameters nor rope_scaling, where transformers would take YaRN by 32: "
                "say which RoPE it is, rope_type default for the plain one"
            )
        shared = read_shared(read, rope_base=150_000.0, norm_eps=1e-5, balance=0.001)
        kinds = {"sliding_attention": True, "full_attention": False}
        types = read.take("layer_types", [("sliding_attention", "full_attention")[i % 2] for i in range(shared["n_layers"])])
        if unknown := set(types) - set(kinds):
            raise ValueError(f"config.json has layer_types {sorted(unknown)}; those of a gpt_oss are {', '.join(kinds)}")
        quantisation = read.take("quantization_config", {})
        if quantisation and quantisation.get("quant_method") != "mxfp4":
            raise ValueError(
                f"config.json has quantization_config {quantisation}: of packed weights, those with quant_method mxfp4 are read"
            )
        result = GptOssConfig(
            **shared,
            n_kv_heads=read.take("num_key_value_heads", 8),
            head_dim=read.take("head_dim", 64),
            d_ff=read.take("intermediate_size"),
            n_experts=read.take("num_local_experts", read.take("num_experts", 128)),
            window=read.take("sliding_window", 128),
            sliding=tuple(kinds[each] for each in types),
            attention_bias=read.take("attention_bias", True),
            swiglu_alpha=read.take("swiglu_alpha", 1.702),
            swiglu_limit=read.take("swiglu_limit", 7.0),
        )
        read.expect("experts_per_token", result.top_k, default=result.top_k)  # OpenAI's names beside those of Hugging Face
        if isinstance(result.rope_scaling, Yarn):
            read.expect("initial_context_length", result.rope_scaling.original_context, default=result.rope_scaling.original_context)
        read.finish(harmless=set())
        return result

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` under which `transformers` computes the same function."""
        # Where the file is silent about RoPE, transformers takes the YaRN of the published models: plain RoPE has to be said.
        plain = {"rope_parameters": {"rope_type": "default", "rope_theta": self.rope_base}} if self.rope_scaling is None else {}
        return {
            "architectures": ["GptOssForCausalLM"],
            **write_shared(self),
            **plain,
            "head_dim": self.head_dim,
            "intermediate_size": self.d_ff,
            "num_local_experts": self.n_experts,
            "sliding_window": self.window,
            "layer_types": ["sliding_attention" if slides else "full_attention" for slides in self.sliding],
            "attention_bias": self.attention_bias,
            "swiglu_alpha": self.swiglu_alpha,
            "swiglu_limit": self.swiglu_limit,
        }


# ------------------------------------------------------------------------------------------- block and model


class GptOss(AbstractSparse):
    """Experts in every layer, all maps with biases."""

    @staticmethod
    def block(config: GptOssConfig, layer: int, *, key: Key[Array, ""]) -> Block:
        attn_key, router_key, experts_key = jr.split(key, 3)
        c, out = config, out_std(config)
        attn = Attention.init(
            c.d_model,
            c.n_heads,
            c.n_kv_heads,
            c.head_dim,
            std=c.init_std,
            out_std=out,
            bias=c.attention_bias,
            sinks=True,
            window=c.window if c.sliding[layer] else None,
            dropout=c.attention_dropout,
            key=attn_key,
        )
        router = Router.init(c.d_model, c.n_experts, c.top_k, normalised=True, bias=True, std=c.init_std, key=router_key)
        glu = ClampedSwiGLU(c.swiglu_alpha, c.swiglu_limit)
        return Block.of(
            c,
            attn,
            MoE(router, Experts.init(c.d_model, c.d_ff, c.n_experts, std=c.init_std, out_std=out, glu=glu, bias=True, key=experts_key)),
        )


# ------------------------------------------------------------------------------------------- presets

# Published shapes, from each repository's config.json.
PRESETS = {
    "gpt-oss-20b": GptOssConfig(
        vocab=201_088, d_model=2880, n_layers=24, n_heads=64, n_kv_heads=8, head_dim=64, d_ff=2880, n_experts=32, top_k=4,
        context=131_072, rope_base=150_000.0, balance=0.9, window=128, sliding=(True, False) * 12,
        rope_scaling=Yarn(factor=32.0, original_context=4096, truncate=False),
    ),
}  # fmt: skip

# ------------------------------------------------------------------------------------------- HF names


def _unpacked(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """MXFP4 lies (experts, out, in / 32, 16); unpacked, the file would have (experts, in, out)."""
    return from_mxfp4(blocks, scales).swapaxes(-1, -2)


def _matrices(key: str) -> Any:
    return packed(transposed(key), ("_blocks", "_scales"), _unpacked)


# role of our leaf → key in the file; {i} is the layer. Outputs of gate and up take turns.
HF_NAMES: Names = SHARED_NAMES | {
    "attn.q_proj.bias": "model.layers.{i}.self_attn.q_proj.bias",
    "attn.k_proj.bias": "model.layers.{i}.self_attn.k_proj.bias",
    "attn.v_proj.bias": "model.layers.{i}.self_attn.v_proj.bias",
    "attn.o_proj.bias": "model.layers.{i}.self_attn.o_proj.bias",
    "attn.sinks": "model.layers.{i}.self_attn.sinks",
    "mlp.router.weight": "model.layers.{i}.mlp.router.weight",
    "mlp.router.bias": "model.layers.{i}.mlp.router.bias",
    "mlp.experts.gate_proj.weight": part(0, _matrices("model.layers.{i}.mlp.experts.gate_up_proj"), rows=1),
    "mlp.experts.up_proj.weight": part(1, _matrices("model.layers.{i}.mlp.experts.gate_up_proj"), rows=1),
    "mlp.experts.down_proj.weight": _matrices("model.layers.{i}.mlp.experts.down_proj"),
    "mlp.experts.gate_proj.bias": part(0, "model.layers.{i}.mlp.experts.gate_up_proj_bias", rows=1),
    "mlp.experts.up_proj.bias": part(1, "model.layers.{i}.mlp.experts.gate_up_proj_bias", rows=1),
    "mlp.experts.down_proj.bias": "model.layers.{i}.mlp.experts.down_proj_bias",
}
