"""Models written by `transformers` give its logits here. The folders come from `make_golden.py`."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lm

GOLDEN = sorted(path.parent for path in (Path(__file__).parent / "golden").glob("*/expected.npz"))


def test_there_is_a_golden_model_of_each_architecture():
    kinds = {lm.load_pretrained(folder).config.model_type for folder in GOLDEN}
    assert kinds == set(lm.ARCHITECTURES)


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_logits_equal_those_of_transformers(folder):
    expected = np.load(folder / "expected.npz")
    model = lm.load_pretrained(folder)
    # fp32 on both sides, sums in another order; logits are of order 1.
    np.testing.assert_allclose(model(jnp.asarray(expected["tokens"])), expected["logits"], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_what_was_loaded_is_written_back_tensor_for_tensor(folder, tmp_path):
    lm.save_pretrained(lm.load_pretrained(folder), tmp_path)
    theirs, ours = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name])
