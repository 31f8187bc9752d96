"""Multi-head attention with grouped keys (MHA and GQA), RoPE, optional norms on queries and keys, and a cache."""

from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from einops import rearrange
from jaxtyping import Array, Float, Key

from lm.base import mark
from lm.cache import LayerCache
from lm.kernels import REFERENCE, Ops
from lm.layers import Linear, RMSNorm
from lm.masks import Facts, check_window


class Attention(eqx.Module):
    """softmax(scale · q kᵀ) v over the places the facts allow, between four linear maps.

    `key` is for the dropout of attention probabilities; `None` means evaluation, whatever the rate.
    """

    q_proj: Linear  # d_model → heads · head_dim
    k_proj: Linear  # d_model → kv_heads · head_dim
    v_proj: Linear  # d_model → kv_heads · head_dim
    o_proj: Linear  # heads · head_dim → d_model
    q_norm: RMSNorm | None  # before RoPE, over head_dim (Qwen3; Dehghani et al. 2023, arXiv:2302.05442) or over all heads together (OLMo 2)
    k_norm: RMSNorm | None  # None: no norm
    n_kv_heads: int = eqx.field(static=True)  # for the cache: wrappers such as LoRA hide the weights' shapes
    head_dim: int = eqx.field(static=True)  # the arrays cannot tell where one head ends
    sinks: Float[Array, " heads"] | None = None  # a score more for each head, of a place with nothing in it (gpt-oss); None: no such place
    window: int | None = eqx.field(static=True, default=None)  # positions a query sees, itself included; None: all
    scale: float | None = eqx.field(static=True, default=None)  # of scores; None: 1 / √head_dim
    softcap: float | None = eqx.field(static=True, default=None)  # scores never pass ±softcap; None: they may
    clip: float | None = eqx.field(static=True, default=None)  # entries of q, k, v never pass ±clip (DBRX, OLMoE); None: they may
    dropout: float = eqx.field(static=True, default=0.0)  # of attention probabilities, where a key is given
    ops: Ops = eqx.field(static=True, default=REFERENCE)

    @staticmethod
    def init(
        d_model: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        *,
        std: float,
        out_std: float,
        key: Key[Array, ""],
        bias: bool = False,
        out_bias: bool | None = None,
        qk_norm_eps: float | None = None,
        qk_norm_over: Literal["head", "heads"] = "head",
        qk_norm_offset: float = 0.0,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        clip: float | None = None,
        sinks: bool = False,
        dropout: float = 0.0,
    ) -> "Attention":
        """`out_std` is the standard deviation of `o_proj`, `out_bias` its bias (`None`: as the three others). `qk_norm_eps` puts RMSNorms
        on queries and keys: on each head, or on all of them together.
        `sinks` begin at 0, as one more key that no query is drawn to."""
        q_key, k_key, v_key, o_key = jr.split(key, 4)
        q_width, k_width = (head_dim, head_dim) if qk_norm_over == "head" else (n_heads * head_dim, n_kv_heads * head_dim)
        return Attention(
            q_proj=Linear.init(d_model, n_heads * head_dim, std=std, key=q_key, bias=bias),
            k_proj=Linear.init(d_model, n_kv_heads * head_dim, std=std, key=k_key, bias=bias),
            v_proj=Linear.init(d_model, n_kv_heads * head_dim, std=std, key=v_key, bias=bias),
            o_proj=Linear.init(n_heads * head_dim, d_model, std=out_std, key=o_key, bias=bias if out_bias is None else out_bias),
            q_norm=None if qk_norm_eps is None else RMSNorm.init(q_width, qk_norm_eps, qk_norm_offset),
            k_norm=None if qk_norm_eps is None else RMSNorm.init(k_width, qk_norm_eps, qk_norm_offset),
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            window=window,
            scale=scale,
            softcap=softcap,
            clip=clip,
            sinks=jnp.zeros(n_heads) if sinks else None,
            dropout=dropout,
        )

    def __check_init__(self) -> None:
        check_window(self.window)
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap must be above 0, or None for scores as they are; got {self.softcap}")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip must be above 0, or None for queries, keys and values as they are; got {self.clip}")

    def __call__(
        self,
        x: Float[Array, "*batch seq d_model"],
        facts: Facts,
        cache: LayerCache | None = None,
        *,
        key: Key[Array, ""] | None = None,
        values: Float[Array, "*batch kv_heads seq head_dim"] | None = None,
    ) -> tuple[Float[Array, "*batch seq d_model"], LayerCache | None]:
        """`values`: what is mixed, and remembered, in place of `self.values(x)`."""
        q = self._heads(self.q_proj(x), self.q_norm)
        k = self._heads(self.k_proj(x), self.k_norm)
        v = self.values(x) if values is None else values
        if facts.rope is not None:
            q, k = self._rotated(q, *facts.rope), self._rotated(k, *facts.rope)
        q, k, v = mark(q, "attn.q"), mark(k, "attn.k"), mark(v, "attn.v")

        key_facts = Facts(facts.positions, facts.segments)
        if cache is not None:
            fresh, cache = cache.fresh, cache.append(k, v, key_facts)
            if not fresh:  # a prompt looks at itself, without the empty slots behind it
                k, v, key_facts = cache.keys.astype(q.dtype), cache.values.astype(q.dtype), cache.facts

        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        mixed = self.ops.attention(q, k, v, facts, key_facts, scale, self.window, self.softcap, self.dropout, key=key, sinks=self.sinks)
        mixed = rearrange(mark(mixed, "attn.mixed"), "... heads seq head_dim -> ... seq (heads head_dim)")
        return mark(self.o_proj(mixed), "attn.out"), cache

    def values(self, x: Float[Array, "*batch seq d_model"]) -> Float[Array, "*batch kv_heads seq head_dim"]:
        """The values of these tokens."""
        return self._heads(self.v_proj(x), None)

    def _heads(self, x: Float[Array, "*batch seq width"], norm: RMSNorm | None) -> Float[Array, "*batch heads seq head_dim"]:
        """Cut into heads, and normed: each head, or, where the norm is as wide as all of them, before the cut. Then clipped."""
        if norm is not None and norm.scale.shape[0] != self.head_dim:
            x, norm = norm(x), None
        x = rearrange(x, "... seq (heads head_dim) -> ... heads seq head_dim", head_dim=self.head_dim)
        x = x if norm is None else norm(x)
        return x if self.clip is None else jnp.clip(x, -self.clip, self.clip)

    def _rotated(self, x: Array, cos: Array, sin: Array) -> Array:
        """Turned by its position; where the tables are narrower than a head, only its first part (partial rotary)."""
        width = cos.shape[-1]
        if width == self.head_dim:
            return self.ops.rotate(x, cos, sin)
        return jnp.concatenate([self.ops.rotate(x[..., :width], cos, sin), x[..., width:]], axis=-1)

    def empty_cache(self, batch: tuple[int, ...], slots: int, dtype: Any) -> LayerCache:
        return LayerCache.empty(batch, self.n_kv_heads, slots, self.head_dim, dtype)
