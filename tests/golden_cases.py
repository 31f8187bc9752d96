"""The golden models: what `lm/make_golden.py` wrote, case by case."""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(__file__).parent / "lm" / "golden"
CASES = [(file.stem, name) for file in sorted(GOLDEN.glob("*.json")) for name in json.loads(file.read_text())]
each_case = pytest.mark.parametrize(("family", "case"), CASES, ids=[f"{family}-{case}" for family, case in CASES])


@lru_cache
def golden(family: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{family}.npz") as file:
        return dict(file)
