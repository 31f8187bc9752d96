"""Several sources as one: the spec `A:0.7,B:0.3`, and the `Source` made of its parts.

A spec is a mixture if no file or folder has it for a name and a comma stands right after `:NUMBER`. Each part then ends at the
first `:NUMBER` that a comma or the end of the spec follows, so colons inside (`hf://owner/name/split:0.3`) are part of the
name. Weights are shares of the training tokens and are normalised: `A:7,B:3` is the same mixture.
"""

import hashlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import grain

from data.documents import Part, Source

_NOT_FINITE = r"[-+]?(?:nan|inf|infinity)"  # numbers to Python, so refused as such
_PART = re.compile(rf"(.+?):([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|{_NOT_FINITE})(?:,\s*|$)", re.DOTALL | re.IGNORECASE)
_IS_MIXTURE = re.compile(rf":(?:[-+]?[\d.]+(?:[eE][-+]?\d+)?|{_NOT_FINITE}),", re.IGNORECASE)


def parse_mixture(spec: str) -> list[tuple[str, float]] | None:
    """The parts of a mixture and their weights as typed; `None` if `spec` is a single source.

    **Raises:** `ValueError` for a part without a weight, a weight that is not above 0 and finite, or a part named twice.
    """
    if not _IS_MIXTURE.search(spec) or Path(os.path.expanduser(spec)).exists():
        return None
    parts: list[tuple[str, float]] = []
    at = 0
    while at < len(spec):
        if (found := _PART.match(spec, at)) is None:
            raise ValueError(
                f"the part '{spec[at:]}' of '{spec}' has no weight: expected SOURCE:WEIGHT,SOURCE:WEIGHT, as in a.txt:0.7,b/:0.3"
            )
        name, weight = found[1].strip(), float(found[2])
        if not 0 < weight < float("inf"):
            raise ValueError(f"the weight of '{name}' must be above 0 and finite, got {found[2]}: leave it out if you do not want it")
        if name in (earlier for earlier, _ in parts):
            raise ValueError(f"'{name}' stands in the mixture twice: give it one weight")
        parts.append((name, weight))
        at = found.end()
    return parts


def mixed_source(spec: str, parts: Sequence[Part]) -> Source:
    """All documents of the parts, one part after another; the record holds those of the parts, and their counts added up.

    **Raises:** `ValueError` if two parts are the same text under two names.
    """
    for part, other in itertools.combinations(parts, 2):
        if part.source.record["sha256"] == other.source.record["sha256"]:
            raise ValueError(f"'{part.name}' and '{other.name}' are the same text: name it once, and give it one weight")
    records = [part.source.record for part in parts]
    total = sum(part.weight for part in parts)
    added = {name: None for record in records for name, value in record.items() if isinstance(value, int)}
    left_out = sum((Counter(record.get("left_out", {})) for record in records), Counter())
    return Source(
        "+".join(part.source.name for part in parts),
        grain.MapDataset.concatenate([part.source.train for part in parts]),
        grain.MapDataset.concatenate([part.source.held_out for part in parts]),
        grain.MapDataset.concatenate([part.source.whole for part in parts]),
        {
            "spec": spec,
            "kind": "mixture",
            **{name: sum(record.get(name, 0) for record in records) for name in added},
            "held_out_rule": "; ".join(dict.fromkeys(record["held_out_rule"] for record in records)),
            "left_out": dict(sorted(left_out.items())),
            # The documents, not the weights: with others the same text is held out and the same caches serve.
            "sha256": hashlib.sha256("".join(record["sha256"] for record in records).encode()).hexdigest(),
            "parts": [{"weight": part.weight / total, **part.source.record} for part in parts],
        },
        tuple(parts),
    )
