"""What a model has read and still knows: the ids, and the caches that hold them. Only what is new is read."""

from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from lm.base import AbstractLM
from lm.decoding import begin, draw, read, rewind, with_key
from lm.sampling import Sampler


class Memory:
    """One text in the caches of a model.

    read [1, 2, 3, 4]       4 are read
    draw                    5, 6 are drawn
    read [1, 2, 3, 4, 9]    5 and 6 are forgotten, 9 is read
    """

    def __init__(self, model: AbstractLM, slots: int) -> None:
        """`slots` is the most tokens there will be; memory for all of them is taken now."""
        self.model, self.slots = model, slots
        self.ids: list[int] = []
        self._state = begin(model, 1, slots)

    @property
    def room(self) -> int:
        return self.slots - len(self.ids)

    def known(self, ids: Sequence[int] | np.ndarray) -> int:
        """How many of `ids`, from the first on, need not be read again. The last one always is, for what comes after it."""
        return next(
            (i for i, (old, new) in enumerate(zip(self.ids, ids[:-1], strict=False)) if old != new), min(len(self.ids), len(ids) - 1)
        )

    def read(
        self,
        ids: Sequence[int] | np.ndarray,
        *,
        told: Callable[[int], None] = lambda done: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Make `ids` what the model has read; what else it knew is forgotten.

        **Arguments:**

        - `told`: called with the number of tokens read, after each chunk.
        - `stopped`: asked after each chunk whether to leave off. What was read stays known.

        **Returns:** Whether all was read.
        """
        kept = self.known(ids)
        self._forget(kept)
        whole = [int(token) for token in ids]
        for state, done in read(self.model, self._state, whole[kept:], self.room):
            self._state, self.ids = state, whole[: kept + done]
            told(done)
            if stopped():
                break
        return len(self.ids) == len(whole)

    def draw(self, sampler: Sampler, key: Key[Array, ""], most: int, stop_ids: Sequence[int]) -> Iterator[int]:
        """Tokens as they are drawn, until one of `stop_ids`, which is not given, or `most`. Who leaves off before the end may go on with
        `read`, as after it."""
        self._state = with_key(self._state, key, self.ids if sampler.repetition_penalty != 1 else None)
        for state, tokens in draw(self.model, self._state, sampler, min(most, self.room), stop_ids=stop_ids):
            # Of a stop id, which was read too, `decode` does not say which it was.
            self._state = rewind(state, jnp.array(1)) if bool(state.done[0]) else state
            self.ids += tokens
            yield from tokens

    def _forget(self, kept: int) -> None:
        if kept < len(self.ids):
            self._state = rewind(self._state, jnp.array(len(self.ids) - kept))
            self.ids = self.ids[:kept]
