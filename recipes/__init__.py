"""Recipes: one literate script a stage, run as `python -m recipes.<name>`.

Before jax is imported the process gets the settings its processor likes (see `train.process.prepare`)."""

from train.process import prepare

prepare()
