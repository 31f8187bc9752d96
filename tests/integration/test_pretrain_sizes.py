"""The recipes for one GPU run from corpus to export: here with a model of a few thousand parameters."""

import json

import jax.numpy as jnp
import pytest
from integration.recipe_runs import corpus, run

import lm

TINY = [
    *("--vocab", "400", "--d-model", "32", "--n-layers", "2", "--n-heads", "2", "--n-kv-heads", "2", "--d-ff", "48"),
    *("--seq", "64", "--batch", "8", "--step.micro-batches", "2", "--steps", "6", "--validate-rows", "8", "--report-samples", "3"),
    *("--held-out-documents", "2", "--tokenizer-documents", "20"),
]


@pytest.mark.parametrize("recipe", ["pretrain_124m", pytest.param("pretrain_1b", marks=pytest.mark.heavy)])
def test_a_recipe_runs_to_its_export_and_is_resumed_by_its_name(recipe, tmp_path):
    arguments = [*TINY, "--data", corpus(tmp_path / "corpus"), "--run-dir", tmp_path / "run"]
    status, output = run(arguments, tmp_path / "cache", recipe)
    assert status == 0, output
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["sessions"][0]["command"][2] == f"recipes.{recipe}"
    assert manifest["corpus"]["held_out_documents"] == 2
    assert "tokenizer of 400 tokens on 20 documents" in output
    assert json.loads((tmp_path / "run" / "results.json").read_text())["bits_per_byte"] < 8
    model = lm.load_pretrained(tmp_path / "run" / "export")
    assert model(jnp.arange(7)).shape == (7, 400)

    status, output = run(["--run-dir", tmp_path / "run", "--resume"], tmp_path / "cache", recipe)
    assert status == 0, output
    assert "training is complete" in output
