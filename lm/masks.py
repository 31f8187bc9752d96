"""Who may look at whom: masks are facts, not matrices.

A token carries two facts, its *position* in its document and the *segment* (document) it belongs to. `may_attend` is the only mask rule of
the house: it trains, packs, prefills, decodes and slides. What a picture of the mask would show follows from the facts:

    tokens      the  cat  sat  |  a  dog  |  (padding)
    positions    0    1    2      0   1       0   0
    segments     1    1    1      2   2       0   0
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

PADDING = 0  # segment of tokens that stand for nothing; real documents count from 1
UNWRITTEN = -1  # segment of cache slots nothing has been written to yet


class Facts(eqx.Module):
    """What a block must know of the tokens beside their vectors.

    A family may add its own: `rope` holds whatever its attention rotates with (a pair of tables, or one pair for each base), `own` what
    else its blocks ask for.
    """

    positions: Int[Array, "*batch seq"]  # place in the document, from 0
    segments: Int[Array, "*batch seq"]  # document in the row: 1, 2, ...; 0 padding; -1 an unwritten cache slot
    rope: Any = None  # (cos, sin), each `*batch seq head_dim`
    own: Any = None  # of the family, known before the first block


def may_attend(queries: Facts, keys: Facts, window: int | None = None) -> Bool[Array, "*batch queries keys"]:
    """True where a query may look at a key: same segment, not later, and within the window.

    **Arguments:**

    - `queries`, `keys`: the facts of the two sides, with the same batch axes.
    - `window`: how many positions a query sees, itself included; `None` for all earlier ones.

    Padding sees only padding, so no row of the mask of a padded batch is empty.
    """
    check_window(window)
    q_positions, k_positions = queries.positions[..., :, None], keys.positions[..., None, :]
    allowed = (queries.segments[..., :, None] == keys.segments[..., None, :]) & (k_positions <= q_positions)
    if window is not None:
        allowed &= q_positions - k_positions < window
    return allowed


def mask_picture(facts: Facts, window: int | None = None) -> str:
    """The mask of one row as text for a terminal: a line a query, a column a key.

    `■` is a token of the same document that the query sees, `□` the query itself, `·` what it does not see. On the left each query's
    segment and position. For a row of two documents and one place of padding:

        1:0 □ · · · ·
        1:1 ■ □ · · ·
        2:0 · · □ · ·
        2:1 · · ■ □ ·
        0:0 · · · · □
    """
    if facts.positions.ndim != 1:
        raise ValueError(f"a picture is of one row; these facts have shape {facts.positions.shape}: take one, as in positions[0]")
    allowed = np.asarray(may_attend(facts, facts, window))
    names = [f"{segment}:{position}" for segment, position in zip(facts.segments.tolist(), facts.positions.tolist(), strict=True)]
    width = max(map(len, names), default=0)
    lines = []
    for query, (name, row) in enumerate(zip(names, allowed, strict=True)):
        cells = ["·" if not seen else "□" if key == query else "■" for key, seen in enumerate(row)]
        lines.append(f"{name:>{width}} {' '.join(cells)}")
    return "\n".join(lines)


def check_window(window: int | None) -> None:
    """A window that shows nothing, in words."""
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (a token sees itself), or None to see all earlier ones; got {window}")


def default_facts(tokens: Int[Array, "*batch seq"], start: Int[Array, ""] | int = 0) -> Facts:
    """The facts of plain text: one document a row, counted from `start`."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[-1], dtype=jnp.int32) + start, tokens.shape)
    return Facts(positions, jnp.ones_like(positions))
