"""The keys and values one layer remembers while it generates."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lm.masks import UNWRITTEN, Facts


class LayerCache(eqx.Module):
    """One layer's memory: `slots` places, filled from the left.

    Each slot keeps its facts, so the one mask rule says what may be looked at: an unwritten slot belongs to segment -1, where no token
    lives. Rows of a batch share the write index; ragged prompts are therefore padded on the *left* (segment 0).
    """

    keys: Float[Array, "*batch kv_heads slots head_dim"]
    values: Float[Array, "*batch kv_heads slots head_dim"]
    positions: Int[Array, "*batch slots"]
    segments: Int[Array, "*batch slots"]
    filled: Int[Array, ""]  # the next slot to write
    fresh: bool = eqx.field(static=True, default=False)  # nothing was ever written: a row that comes then has only itself to look at

    @staticmethod
    def empty(batch: tuple[int, ...], kv_heads: int, slots: int, head_dim: int, dtype: jnp.dtype | type) -> "LayerCache":
        """Bytes: 2 · batch · kv_heads · slots · head_dim · itemsize."""
        shape = (*batch, kv_heads, slots, head_dim)
        return LayerCache(
            keys=jnp.zeros(shape, dtype),
            values=jnp.zeros(shape, dtype),
            positions=jnp.zeros((*batch, slots), jnp.int32),
            segments=jnp.full((*batch, slots), UNWRITTEN, jnp.int32),
            filled=jnp.zeros((), jnp.int32),
            fresh=True,
        )

    @property
    def slots(self) -> int:
        return self.keys.shape[-2]

    @property
    def facts(self) -> Facts:
        return Facts(self.positions, self.segments)

    def append(
        self,
        keys: Float[Array, "*batch kv_heads seq head_dim"],
        values: Float[Array, "*batch kv_heads seq head_dim"],
        facts: Facts,
    ) -> "LayerCache":
        """Write `seq` tokens at the next free slots. The caller makes sure that they fit: past the end JAX would overwrite the last
        ones."""
        seq = keys.shape[-2]
        if seq > self.slots:
            raise ValueError(f"{seq} tokens do not fit into a cache of {self.slots} slots: build a longer one")

        def write(slots: Array, new: Array, axis: int) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(slots, new.astype(slots.dtype), self.filled, axis)

        return LayerCache(
            keys=write(self.keys, keys, keys.ndim - 2),
            values=write(self.values, values, values.ndim - 2),
            positions=write(self.positions, facts.positions, facts.positions.ndim - 1),
            segments=write(self.segments, facts.segments, facts.segments.ndim - 1),
            filled=self.filled + seq,
        )

    def rewound(self, back: Int[Array, ""]) -> "LayerCache":
        """As it was `back` tokens ago: the slots written since are free again."""
        filled = self.filled - back
        segments = jnp.where(jnp.arange(self.slots) < filled, self.segments, UNWRITTEN)
        return LayerCache(keys=self.keys, values=self.values, positions=self.positions, segments=segments, filled=filled)
