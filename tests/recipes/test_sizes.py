"""The recipes for one GPU: what their pages say of themselves."""

import jax
import pytest
from loguru import logger

import lm
from lm.hf import abstract
from recipes import pretrain_1b, pretrain_124m, pretrain_small
from recipes.command_line import parse
from train.step import StepConfig

RECIPES = [pretrain_124m, pretrain_1b]


def config_of(recipe, *argv):
    name = recipe.__name__.removeprefix("recipes.")
    return parse(recipe.Config, "", recipe=name, presets=recipe.PRESETS, default_preset="h100", argv=list(map(str, argv)))


def parameters(config) -> int:
    skeleton = abstract(lm.ARCHITECTURES["qwen3"].model.init, config.model_config_of(config.vocab))
    return sum(leaf.size for leaf in jax.tree.leaves(skeleton) if hasattr(leaf, "shape"))


@pytest.mark.parametrize(("recipe", "millions"), [(pretrain_124m, 123.6), (pretrain_1b, 1107.4)])
def test_a_run_has_twenty_tokens_a_parameter(recipe, millions):
    config = config_of(recipe)
    n_params = parameters(config)
    assert n_params / 1e6 == pytest.approx(millions, abs=0.1)
    assert config.steps * config.batch * config.seq / n_params == pytest.approx(20, rel=0.02)


@pytest.mark.parametrize("recipe", RECIPES)
def test_presets_and_flags_are_known_and_win_in_their_order(recipe):
    assert config_of(recipe) == recipe.Config()
    a6000 = config_of(recipe, "--preset", "a6000", "--seed", 3)
    assert (a6000.preset, a6000.seed) == ("a6000", 3)
    assert a6000.step == recipe.PRESETS["a6000"]["step"]
    assert config_of(recipe, "--preset", "a6000", "--step.micro-batches", 256).step == StepConfig(micro_batches=256)


@pytest.mark.parametrize("recipe", RECIPES)
def test_both_cards_train_the_same_thing(recipe):
    """What differs is how much memory a step takes, and how long the run is."""
    one, other = (config_of(recipe, "--preset", preset).model_dump() for preset in ("h100", "a6000"))
    one["step"].pop("micro_batches"), other["step"].pop("micro_batches")
    assert {name for name in one if one[name] != other[name]} <= {"preset", "steps", "remat"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_setting_keeps_the_bounds_and_the_name_it_has_in_the_small_recipe(recipe):
    theirs = recipe.Config.model_fields
    for name, field in pretrain_small.Experiment.model_fields.items():
        assert theirs[name].metadata == field.metadata, name
        assert theirs[name].json_schema_extra == field.json_schema_extra, name


def test_a_model_too_large_for_the_time_is_told_of():
    words: list[str] = []
    sink = logger.add(words.append, format="{level} {message}")
    pretrain_small.tell_if_too_large(1000, 500)
    assert not words
    pretrain_small.tell_if_too_large(1000, 420)
    logger.remove(sink)
    assert words[0].startswith("WARNING only 0.42 tokens a parameter: in the same time a smaller model")
