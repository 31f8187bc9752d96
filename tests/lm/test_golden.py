"""Models of `transformers` give its logits here. The files come from `make_golden.py`; weights are drawn by name on both sides."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from golden_cases import CASES, each_case, golden
from golden_weights import draw
from safetensors.numpy import load_file, save_file

import lm
from lm.models import NATIVE


def folder_of(family: str, case: str, folder: Path) -> Path:
    """As `transformers` would have written it."""
    (folder / "config.json").write_text(str(golden(family)[f"{case}.config"]))
    shapes = json.loads(str(golden(family)[f"{case}.shapes"]))
    save_file({name: draw(name, tuple(shape)) for name, shape in shapes.items()}, folder / "model.safetensors")
    return folder


def test_there_are_golden_models_of_each_architecture():
    assert {family for family, _ in CASES} == set(lm.ARCHITECTURES) - NATIVE


@each_case
def test_logits_equal_those_of_transformers(family, case, tmp_path):
    model = lm.load_pretrained(folder_of(family, case, tmp_path))
    logits = model(jnp.asarray(golden(family)[f"{case}.tokens"]))
    # fp32 on both sides, sums in another order; logits are of order 1 to 10.
    np.testing.assert_allclose(logits, golden(family)[f"{case}.logits"], atol=1e-4, rtol=0)


@each_case
def test_what_was_loaded_is_written_back_tensor_for_tensor(family, case, tmp_path):
    model = lm.load_pretrained(folder_of(family, case, tmp_path))
    lm.save_pretrained(model, tmp_path / "again")
    theirs, ours = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name])
    assert lm.load_pretrained(tmp_path / "again").config == model.config
