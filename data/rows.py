"""Training rows by number, without end: `PackedRows` of one cache, `MixedRows` of several in fixed shares.

Row g of one cache belongs to epoch g // rows_per_epoch; every epoch packs the documents in a new order and deals its rows in
another. Every packing makes equally many rows of the same lengths in any order, so all epochs are equally long.

Row g of a mixture is the next row of one of its parts, and which one is arithmetic on g, too: part 0 gets the rows at which
floor(g * share) rises, the others divide what is left in the same way. After any number of rows each part has its share of
them to within a row for every part before it, and no random number is drawn.
"""

import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from data.cache import TokenCache
from data.packing import PACKINGS, Packing, Plan, build_row, describe, require_positive, row_documents

OnEnd = Literal["repeat", "stop"]


@dataclass(frozen=True)
class Mixture:
    """The caches of several sources and the share of the training tokens that each is to have."""

    names: tuple[str, ...]
    caches: tuple[TokenCache, ...]
    weights: tuple[float, ...]  # above 0; only their ratios count
    on_end: OnEnd = "repeat"  # what a part does after its last row: begin again, or refuse to train on

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.caches) == len(self.weights) > 0:
            raise ValueError(f"a mixture has as many names as caches and weights, got {self.names} and {self.weights}")
        for name, weight in zip(self.names, self.weights, strict=True):
            if not 0 < weight < float("inf"):
                raise ValueError(f"the weight of '{name}' must be above 0, got {weight:g}: leave it out if you do not want it")
        if self.on_end not in ("repeat", "stop"):
            raise ValueError(f"on_end must be repeat or stop, got {self.on_end!r}")


class PackedRows:
    """Endless training rows of a cache, by number: `rows[g]` is a dict of the fields of `Batch`, each `[seq]`.

    A Grain random access source. The plan of an epoch takes about 50 bytes a document and is made when one of its rows is
    first read (that of epoch 0 at once, to count its rows); the last two are kept.
    """

    def __init__(self, cache: TokenCache, *, seq: int, seed: int, packing: Packing = "concat") -> None:
        require_positive(seq=seq)
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, got {seed}")
        if packing not in PACKINGS:
            raise ValueError(f"packing must be one of {', '.join(PACKINGS)}, got {packing!r}")
        self.cache, self.seq, self.seed, self.packing = cache, seq, seed, packing
        self.pairs = int((cache.lengths - 1).sum())  # an epoch
        self._epochs: dict[int, tuple[Plan, np.ndarray]] = {}
        self._lock = threading.Lock()  # Grain may read from several threads
        self.rows_per_epoch = self.epoch(0)[0].rows

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        epoch, within = divmod(int(row), self.rows_per_epoch)
        plan, dealt = self.epoch(epoch)
        return build_row(plan, int(dealt[within]), self.cache)

    def epoch(self, epoch: int) -> tuple[Plan, np.ndarray]:
        """The plan of an epoch, and the order in which its rows are dealt."""
        with self._lock:
            if epoch not in self._epochs:
                order = _permutation(len(self.cache), self.seed, epoch, "documents")
                plan = PACKINGS[self.packing](self.cache.lengths, self.seq, order)
                assert epoch == 0 or plan.rows == self.rows_per_epoch, "rows of an epoch depend on the lengths alone"
                dealt = _permutation(plan.rows, self.seed, epoch, "rows")
                self._epochs = dict([*self._epochs.items(), (epoch, (plan, dealt))][-2:])
            return self._epochs[epoch]

    def document_names(self, row: int) -> list[str]:
        """The documents that a row is made of."""
        epoch, within = divmod(int(row), self.rows_per_epoch)
        plan, dealt = self.epoch(epoch)
        return [self.cache.names[i] for i in np.unique(row_documents(plan, int(dealt[within]))) if i >= 0]

    @property
    def documents(self) -> int:
        return len(self.cache)

    def require(self, rows: int, what: str) -> None:
        """There are always more rows: epochs follow one another for ever."""

    def pairs_in(self, rows: int) -> int:
        """How many pairs carry loss in the first `rows` rows."""
        epochs, within = divmod(rows, self.rows_per_epoch)
        if within == 0:
            return epochs * self.pairs
        plan, dealt = self.epoch(epochs)
        per_row = np.add.reduceat(plan.length, plan.row_start[:-1])
        return epochs * self.pairs + int(per_row[dealt[:within]].sum())

    def realised(self, rows: int) -> dict[str, dict[str, float]]:
        """Nothing is mixed here: see `MixedRows.realised`."""
        return {}

    def describe(self) -> dict[str, Any]:
        """Counts of the first epoch. Later ones differ only in which documents are cut or share a row."""
        return {"packing": self.packing, **describe(self.epoch(0)[0])}

    def __repr__(self) -> str:
        how = f"packing={self.packing!r}, seq={self.seq}, seed={self.seed}"
        return f"PackedRows({self.cache!r}, {how}, {self.rows_per_epoch} rows an epoch)"


class MixedRows:
    """Rows of several parts by one number, as `PackedRows`, so that their *tokens* stand in the ratio of the weights.

    A part whose rows hold more padding gets more of them: rows are dealt as weight / (mean pairs of its rows).
    """

    def __init__(self, names: Sequence[str], parts: Sequence[PackedRows], weights: Sequence[float], on_end: OnEnd) -> None:
        self.names, self.parts, self.on_end = list(names), list(parts), on_end
        total = sum(map(Fraction, weights))
        self.weights = [float(Fraction(weight) / total) for weight in weights]
        # Exact numbers, so that row 10^12 is as far from its share as row 10 is.
        per_pair = [Fraction(w) * part.rows_per_epoch / part.pairs for w, part in zip(weights, parts, strict=True)]
        self.row_shares = [share / sum(per_pair) for share in per_pair]
        # The share of part i among the rows that the parts before it left.
        self._of_rest = [share / sum(self.row_shares[i:]) for i, share in enumerate(self.row_shares)]
        self.seq = parts[0].seq
        self.pairs = sum(part.pairs for part in parts)
        self.rows_per_epoch = sum(part.rows_per_epoch for part in parts)  # as many rows as the parts have together
        self.documents = sum(part.documents for part in parts)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        part, within = self.locate(int(row))
        return self.parts[part][within]

    def document_names(self, row: int) -> list[str]:
        """The documents that a row is made of, behind the name of their part."""
        part, within = self.locate(int(row))
        return [f"{self.names[part]}/{name}" for name in self.parts[part].document_names(within)]

    def locate(self, row: int) -> tuple[int, int]:
        """The part that row `row` comes from, and its number there."""
        before, after = self.dealt(row), self.dealt(row + 1)
        part = next(i for i in range(len(self.parts)) if after[i] > before[i])
        return part, before[part]

    def dealt(self, rows: int) -> list[int]:
        """How many of the first `rows` rows come from each part."""
        counts, left = [], rows
        for share in self._of_rest:
            counts.append(left * share.numerator // share.denominator)
            left -= counts[-1]
        return counts

    def pairs_in(self, rows: int) -> int:
        """How many pairs carry loss in the first `rows` rows."""
        return sum(part.pairs_in(n) for part, n in zip(self.parts, self.dealt(rows), strict=True))

    def rows_before_an_end(self) -> int:
        """How many rows there are before one would repeat a row of its part."""
        low, high = 0, 2 * max(int(part.rows_per_epoch / share) + 2 for part, share in zip(self.parts, self.row_shares, strict=True))
        while high - low > 1:
            middle = (low + high) // 2
            if any(n > part.rows_per_epoch for n, part in zip(self.dealt(middle), self.parts, strict=True)):
                high = middle
            else:
                low = middle
        return low

    def require(self, rows: int, what: str) -> None:
        """A `ValueError` if `rows` rows, which are `what`, are more than there are."""
        if self.on_end == "stop" and rows > (most := self.rows_before_an_end()):
            first = next(i for i, n in enumerate(self.dealt(most + 1)) if n > self.parts[i].rows_per_epoch)
            raise ValueError(
                f"'{self.names[first]}' ends early: its {self.parts[first].rows_per_epoch} rows last for {most} rows of the mixture, "
                f"and asked for are {what} ({rows} rows). Train for fewer steps, give it less weight than "
                f"{self.weights[first]:.3g}, or let it repeat (on_end repeat)"
            )

    def realised(self, rows: int) -> dict[str, dict[str, float]]:
        """What the first `rows` rows are made of, by the names of the parts: rows, tokens, their share, passes over the part."""
        dealt = self.dealt(rows)
        tokens = [part.pairs_in(n) for part, n in zip(self.parts, dealt, strict=True)]
        return {
            name: {
                "weight": weight,
                "rows": n,
                "tokens": count,
                "token_share": count / max(sum(tokens), 1),
                "epochs": n / part.rows_per_epoch,
            }
            for name, weight, part, n, count in zip(self.names, self.weights, self.parts, dealt, tokens, strict=True)
        }

    def describe(self) -> dict[str, Any]:
        """Counts of the first epoch of each part."""
        return {name: part.describe() for name, part in zip(self.names, self.parts, strict=True)}

    def __repr__(self) -> str:
        parts = ", ".join(f"{name} {weight:.3g}" for name, weight in zip(self.names, self.weights, strict=True))
        return f"MixedRows({parts}; {self.rows_per_epoch} rows in all parts)"


Rows = PackedRows | MixedRows


def describe_rows(rows: Rows, first: int, stop: int, most: int = 8) -> str:
    """Words on the rows `first` to `stop - 1`: the documents in them, `most` by name."""
    names = list(dict.fromkeys(name for row in range(first, stop) for name in rows.document_names(row)))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"rows {first} to {stop - 1}, from {', '.join(names[:most])}{more}"


def training_rows(tokens: TokenCache | Mixture, *, seq: int, seed: int, packing: Packing = "concat") -> Rows:
    """The rows of one cache, or of a mixture. Parts have seeds of their own, or equal parts would be dealt alike."""
    if isinstance(tokens, TokenCache):
        return PackedRows(tokens, seq=seq, seed=seed, packing=packing)
    for name, cache in zip(tokens.names, tokens.caches, strict=True):
        if (cache.lengths < 2).all():
            raise ValueError(f"the part '{name}' holds no (token, target) pair to train on")
    parts = [PackedRows(cache, seq=seq, seed=seed + i, packing=packing) for i, cache in enumerate(tokens.caches)]
    return MixedRows(tokens.names, parts, tokens.weights, tokens.on_end)


def _permutation(n: int, seed: int, epoch: int, what: Literal["documents", "rows"]) -> np.ndarray:
    """A random order of `n` things, the same for ever: NumPy promises the raw bits of a seed, and may change
    `permutation` between versions, which would silently deal a resumed run other rows."""
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch, ("documents", "rows").index(what)]))
    return np.argsort(bits.random_raw(n), kind="stable")
