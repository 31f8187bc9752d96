"""Products of rows with the expert each was sent to: `expert_linear`, in two ways that `lm.kernels` puts into its table.

How many rows an expert gets is known at run time only, and XLA wants shapes before. Rows come sorted by expert and are laid into blocks of
one expert each. With blocks of rows / experts, rounded up, as many blocks as there are experts would do if all got alike, and twice as many
do whatever the router says, so no row is ever dropped; at most half of what is multiplied is empty:

    rows     a a a b c c c c c               6 blocks of 3 for 3 experts and 9 rows
    blocks   a a a | b - - | c c c | c c - | - - - | - - -

`jax.lax.ragged_dot` says the same in one word, but XLA (jaxlib 0.10) multiplies every row by every expert for it, on CPUs, as a look at the
compiled program shows, and on NVIDIA cards.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lm.kernels_cpu import FEW, batched, by_rows


class Blocks(NamedTuple):
    """Where sorted rows lie in blocks of one expert each."""

    expert: Int[Array, " blocks"]  # whose block it is; any, where the block is empty
    row: Int[Array, "blocks size"]  # the row at each place; past the last one where the place is empty
    place: Int[Array, " rows"]  # of each row, counted over all blocks; past the last one for rows that belong to no expert

    @staticmethod
    def of(rows: int, sizes: Int[Array, " experts"]) -> "Blocks":
        experts = len(sizes)
        size = max(1, -(-rows // experts))
        n = min(rows, 2 * experts)  # Σ ceil(size of a group / size) <= experts + rows / size
        ends, block_ends = jnp.cumsum(sizes), jnp.cumsum(-(-sizes // size))
        starts, block_starts = ends - sizes, block_ends - (-(-sizes // size))

        block = jnp.arange(n)
        expert = jnp.minimum(jnp.searchsorted(block_ends, block, side="right", method="compare_all"), experts - 1)
        row = (starts[expert] + (block - block_starts[expert]) * size)[:, None] + jnp.arange(size)
        row = jnp.where((row < ends[expert][:, None]) & (block < block_ends[-1])[:, None], row, rows)

        here = jnp.arange(rows)
        mine = jnp.minimum(jnp.searchsorted(ends, here, side="right", method="compare_all"), experts - 1)
        place = block_starts[mine] * size + here - starts[mine]
        return Blocks(expert, row, jnp.where(here < ends[-1], place, n * size))

    def filled(self, x: Float[Array, "rows d"]) -> Float[Array, "blocks size d"]:
        """Rows in their places, zeros in the empty ones."""
        return x.at[self.row].get(mode="fill", fill_value=0)

    def emptied(self, y: Float[Array, "blocks size d"]) -> Float[Array, "rows d"]:
        """Rows taken out of their places, zeros for those that had none."""
        return y.reshape(-1, y.shape[-1]).at[self.place].get(mode="fill", fill_value=0)


def expert_linear(
    x: Float[Array, "rows d_in"], weight: Float[Array, "experts d_out d_in"], sizes: Int[Array, " experts"]
) -> Float[Array, "rows d_out"]:
    """x Wᵀ with the W of the row's expert: the first `sizes[0]` rows belong to expert 0, the next `sizes[1]` to expert 1, and so on; what
    is left over belongs to none and gives 0. Accumulated in fp32, returned in the dtype of `x`.

    Memory: a copy of at most 2 · experts matrices, or of as many as there are rows.
    """
    blocks = Blocks.of(len(x), sizes)
    # Taken as fp32 only for the gradient's sake: an expert's blocks are added in the dtype they are taken in.
    matrices = weight.astype(jnp.float32)[blocks.expert].astype(weight.dtype)
    y = jnp.einsum("nbi,noi->nbo", blocks.filled(x), matrices, preferred_element_type=jnp.float32)
    return blocks.emptied(y).astype(x.dtype)


@jax.custom_vjp
def expert_linear_by_hand(
    x: Float[Array, "rows d_in"], weight: Float[Array, "experts d_out d_in"], sizes: Int[Array, " experts"]
) -> Float[Array, "rows d_out"]:
    """`expert_linear` with a backward pass that takes the experts' matrices again instead of keeping them, in products of the form that is
    fast on a CPU (see `lm.kernels_cpu`)."""
    blocks = Blocks.of(len(x), sizes)
    inputs, matrices = blocks.filled(x), weight[blocks.expert]
    if inputs.shape[1] < FEW:  # as in decoding: limited by reading the weights, as `kernels_cpu.linear` is for a few rows
        y = jnp.sum(matrices.astype(jnp.float32)[:, None] * inputs.astype(jnp.float32)[:, :, None], axis=-1)
    else:
        y = batched(inputs, matrices, 2, 2)
    return blocks.emptied(y).astype(x.dtype)


def _by_hand_forward(x: Array, weight: Array, sizes: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return expert_linear_by_hand(x, weight, sizes), (x, weight, sizes)


def _by_hand_backward(saved: tuple[Array, Array, Array], dy: Array) -> tuple[Array, Array, None]:
    x, weight, sizes = saved
    blocks = Blocks.of(len(x), sizes)
    dy_blocks = blocks.filled(dy.astype(weight.dtype))
    dx = blocks.emptied(batched(dy_blocks, weight[blocks.expert], 2, 1)).astype(x.dtype)
    d_blocks = batched(by_rows(jnp.swapaxes(dy_blocks, 1, 2)), blocks.filled(x), 2, 1)
    d_weight = jax.ops.segment_sum(d_blocks, blocks.expert, len(weight), indices_are_sorted=True)
    return dx, d_weight.astype(weight.dtype), None


expert_linear_by_hand.defvjp(_by_hand_forward, _by_hand_backward)
