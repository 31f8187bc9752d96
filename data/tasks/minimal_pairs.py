"""Minimal pairs: of two sentences that differ in one point of grammar, the right one should be the likelier.

The form is that of BLiMP (Warstadt et al. 2020, arXiv:1912.00582, "simple LM method"): the log p of whole sentences, nothing divided.
"""

from dataclasses import dataclass

from data.tasks.records import Record

FIELDS = ("sentence_good", "sentence_bad")


@dataclass(frozen=True)
class Pair:
    """Two sentences and the paradigm they belong to."""

    good: str
    bad: str
    group: str  # BLiMP's UID


def pair(record: Record) -> Pair:
    """A record with the fields `sentence_good` and `sentence_bad`; its group is its `UID`, else the file in the zip it stands in."""
    uid = record.fields.get("UID")
    return Pair(record.text("sentence_good"), record.text("sentence_bad"), uid if isinstance(uid, str) else record.group)
