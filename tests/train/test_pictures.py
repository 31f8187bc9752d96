import jax.numpy as jnp
import pytest

import lm
from train.pictures import plot_mask

FACTS = lm.Facts(jnp.array([0, 1, 2, 0, 1, 0]), jnp.array([1, 1, 1, 2, 2, 0]))


def test_the_mask_is_drawn_with_its_tokens(tmp_path):
    path = plot_mask(FACTS, tmp_path / "mask.png", window=2, labels=["the", "cat", "$1", "a", "dog", "(padding)"])
    assert path.read_bytes().startswith(b"\x89PNG")


def test_more_rows_and_wrong_labels_are_refused(tmp_path):
    with pytest.raises(ValueError, match="one row"):
        plot_mask(lm.Facts(FACTS.positions[None], FACTS.segments[None]), tmp_path / "mask.png")
    with pytest.raises(ValueError, match="each of the 6 tokens, got 1"):
        plot_mask(FACTS, tmp_path / "mask.png", labels=["the"])
