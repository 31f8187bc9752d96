"""How the next token is drawn from the logits."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int, Key


@dataclass(frozen=True)
class Sampler:
    """Temperature, cuts and penalties, and the draw.

    `temperature` 0 is greedy. `top_k` keeps the k most likely tokens (Fan et al. 2018, arXiv:1805.04833); `top_p` the fewest tokens that
    hold that much probability (Holtzman et al. 2020, arXiv:1904.09751); `min_p` those at least that fraction as likely as the likeliest
    (Nguyen et al. 2024, arXiv:2407.01082). They are taken in this order, after `temperature`.

    Before all of them, greedy or not: `logit_bias` is added, then the logits of tokens that stand in the prompt or were drawn are divided
    by `repetition_penalty`, or multiplied where negative (Keskar et al. 2019, arXiv:1909.05858, section 4.1; the sign as in
    `transformers`).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0  # 1: none
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added); -inf forbids it

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 (greedy) or above, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1 (or None for all tokens), got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1] (or be None), got {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie in [0, 1] (or be None), got {self.min_p}")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty must be above 0 (1: none; above 1: fewer repetitions), got {self.repetition_penalty}")
        if unusable := [(token, bias) for token, bias in self.logit_bias if not bias < float("inf")]:
            raise ValueError(f"logit_bias must be numbers, or -inf to forbid a token, got {unusable}")

    def __call__(
        self, logits: Float[Array, "batch vocab"], keys: Key[Array, " batch"], seen: Bool[Array, "batch vocab"] | None = None
    ) -> Int[Array, " batch"]:
        """A token for each row, each by its own key. `seen` marks the tokens that `repetition_penalty` is for."""
        logits = self.adjusted(logits, seen)
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.vmap(jr.categorical)(keys, self.filtered(logits)).astype(jnp.int32)

    def adjusted(self, logits: Float[Array, "batch vocab"], seen: Bool[Array, "batch vocab"] | None) -> Float[Array, "batch vocab"]:
        """Logits with bias and penalty."""
        if self.logit_bias:
            tokens, bias = zip(*self.logit_bias, strict=True)
            logits = logits.at[:, jnp.asarray(tokens)].add(jnp.asarray(bias, logits.dtype))
        if self.repetition_penalty != 1 and seen is not None:
            penalised = jnp.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = jnp.where(seen, penalised, logits)
        return logits

    def filtered(self, logits: Float[Array, "batch vocab"]) -> Float[Array, "batch vocab"]:
        """Logits of the distribution that is really sampled: scaled, and -inf where cut off."""
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            kth = jax.lax.top_k(logits, self.top_k)[0][:, -1:]
            logits = jnp.where(logits < kth, -jnp.inf, logits)
        if self.top_p is not None and self.top_p < 1:
            ordered = jnp.sort(logits, axis=-1, descending=True)
            probabilities = jax.nn.softmax(ordered, axis=-1)
            before = jnp.cumsum(probabilities, axis=-1) - probabilities  # mass of the tokens more likely than this one
            least = jnp.min(jnp.where(before < self.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
            logits = jnp.where(logits < least, -jnp.inf, logits)
        if self.min_p is not None and self.min_p > 0:
            least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(self.min_p)
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return logits


GREEDY = Sampler(temperature=0.0)
