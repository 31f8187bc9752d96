"""Weights that need no file: drawn from a seed and the name of the tensor, alike wherever numpy is.

`make_golden.py` puts them into models of `transformers`, `test_golden.py` into a folder that our code loads.
"""

import zlib

import numpy as np


def draw(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """fp32. Vectors have spread too: norms that are all ones and biases that are zero would hide mistakes."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    numbers = rng.standard_normal(shape, np.float32)
    if len(shape) > 1:
        return np.float32(0.15) * numbers
    is_scale = name.endswith("weight") and any(word in name for word in ("norm", "ln_"))
    return np.float32(0.15) * numbers + np.float32(is_scale)
