"""The way out, live: models of ours with random weights, written by `save_pretrained`, are the same models to `transformers`.

Their configs are those of the golden models, so that a family is taken through its branches here once it has cases there. Run with
`pytest -m parity` where torch and transformers are (the extra `parity`)."""

import dataclasses
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import each_case, golden
from tiny import logits_of

import lm
from lm import rope

pytestmark = pytest.mark.parity


def random_model(config):
    """Every array random: norms that are all ones and biases that are zero would hide mistakes."""
    skeleton = eqx.filter_eval_shape(lambda key: lm.build(config, key=key), jax.random.key(0))
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        mean = 1.0 if jax.tree_util.keystr(path).endswith("scale") else 0.0
        return jnp.asarray(rng.normal(mean, 0.15, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, skeleton)


@each_case
def test_transformers_loads_what_we_write_and_computes_the_same(family, case, tmp_path):
    import torch
    import transformers

    written_by_them = json.loads(str(golden(family)[f"{case}.config"]))
    model = random_model(lm.ARCHITECTURES[family].config.from_hf(written_by_them))
    lm.save_pretrained(model, tmp_path)
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(loading.values()), loading  # missing, unexpected, misshapen, errors
    tokens = np.random.default_rng(0).integers(0, model.config.vocab, (1, min(17, model.config.context)))
    with torch.no_grad():
        expected = theirs.eval()(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(logits_of(model, jnp.asarray(tokens, jnp.int32)), expected, atol=1e-4, rtol=0)


@each_case
def test_greedy_text_is_the_same(family, case, tmp_path):
    import torch
    import transformers

    config = lm.ARCHITECTURES[family].config.from_hf(json.loads(str(golden(family)[f"{case}.config"])))
    model = random_model(config)
    lm.save_pretrained(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    prompt = [5, 17, 3]
    settings = transformers.GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        drawn = theirs.generate(torch.tensor([prompt]), generation_config=settings)[0, len(prompt) :].tolist()
    if isinstance(getattr(config, "rope_scaling", None), rope.LongRope):  # a cache wants to know how long the text will be
        fixed = config.rope_scaling.model_copy(update={"length": len(prompt) + 8})
        model = dataclasses.replace(model, config=config.model_copy(update={"rope_scaling": fixed}))
    assert lm.generate(model, [prompt], max_new_tokens=8)[0] == drawn
