"""Adapters: what they compute, where they go, what is trained of them, and that they come off and on again."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tiny import facts_of, logits_of, packed_batch, tiny

import lm
from lm.adapters import adapters_of
from lm.base import leaves_by_path, role
from lm.flight import Flight

TOKENS = jnp.asarray([[5, 3, 9, 11, 2, 96, 0]])
KINDS = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}}


def trained(model, seed=0, **settings):
    """Adapters of random numbers: those of a beginning add nothing."""
    model = lm.add_lora(model, **({"rank": 5, "alpha": 11.0, "key": jr.key(seed)} | settings))
    rng = np.random.default_rng(seed)

    def moved(leaf, is_trained):
        return leaf + 0.1 * rng.standard_normal(leaf.shape).astype(np.float32) if is_trained else leaf

    return jax.tree.map(moved, model, lm.trainable_filter(model))


def assert_near(one, other, rtol=1e-5):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


@pytest.mark.parametrize("kind", KINDS)
def test_new_adapters_change_nothing_and_trained_ones_do(kind):
    model = tiny("llama", n_layers=1)
    before = logits_of(model, TOKENS)
    assert_near(logits_of(lm.add_lora(model, rank=5, key=jr.key(0), **KINDS[kind]), TOKENS), before)
    assert jnp.abs(logits_of(trained(model, **KINDS[kind]), TOKENS) - before).max() > 0.1


def test_lora_computes_its_equation():
    linear = tiny("qwen2", n_layers=1, attention_bias=True).blocks[0].attn.q_proj
    w, b, x = np.asarray(linear.weight, np.float64), np.asarray(linear.bias), np.random.default_rng(1).standard_normal((3, 7, 24))
    down, up = np.random.default_rng(2).standard_normal((5, 24)), np.random.default_rng(3).standard_normal((48, 5))
    m = 1 + np.random.default_rng(4).random(48)
    arrays = [jnp.asarray(each, jnp.float32) for each in (down, up, m)]
    for rslora, s in ((False, 11 / 5), (True, 11 / 5**0.5)):
        changed = w + s * up @ down
        lora = lm.LoRA(linear, arrays[0], arrays[1], None, 11.0, rslora)
        np.testing.assert_allclose(lora(jnp.asarray(x, jnp.float32)), x @ changed.T + b, atol=2e-5 * np.abs(x @ changed.T).max())
        lengths = np.linalg.norm(changed, axis=1)
        np.testing.assert_allclose(lora.row_lengths(), lengths, rtol=1e-5)
        dora = lm.LoRA(linear, *arrays, 11.0, rslora)
        expected = x @ (m[:, None] * changed / lengths[:, None]).T + b
        np.testing.assert_allclose(dora(jnp.asarray(x, jnp.float32)), expected, atol=2e-5 * np.abs(expected).max())
        np.testing.assert_allclose(dora.weight, m[:, None] * changed / lengths[:, None], atol=1e-4)


def test_no_gradient_flows_through_the_rows_lengths():
    linear = tiny("llama", n_layers=1).blocks[0].attn.k_proj
    dora = jax.tree.map(lambda leaf: leaf + 0.1, lm.LoRA.init(linear, 3, 4.0, key=jr.key(0), dora=True))
    x = jr.normal(jr.key(1), (7, 24))
    lengths = dora.row_lengths()

    def plain(up):  # the same with the lengths as numbers
        changed = linear.weight + 0.1 + dora.scale * up @ dora.down
        return jnp.sum(jnp.sin(x @ (dora.magnitude / lengths * changed.T)))

    def ours(up):
        return jnp.sum(jnp.sin(eqx.tree_at(lambda lora: lora.up, dora, up)(x)))

    assert_near(jax.grad(ours)(dora.up), jax.grad(plain)(dora.up), 1e-4)


# ------------------------------------------------------------------------------------------- where they go


def test_patterns_mean_roles_or_paths():
    model = tiny("llama")
    found = adapters_of(lm.add_lora(model, targets=("attn.[qv]_proj", "blocks/1/mlp/*"), key=jr.key(0)))
    assert set(found) == {f"blocks/{i}/attn/{n}_proj" for i in range(3) for n in "qv"} | {
        f"blocks/1/mlp/{n}_proj" for n in ("gate", "up", "down")
    }
    assert len(adapters_of(lm.add_lora(model, key=jr.key(0)))) == 3 * 7
    downs = [np.asarray(lora.down) for lora in found.values() if lora.down.shape == (8, 24)]
    assert len({down.tobytes() for down in downs}) == len(downs)  # each has numbers of its own


def test_the_frozen_matrix_keeps_its_role():
    roles = set(map(role, leaves_by_path(lm.add_lora(tiny("llama", n_layers=1), targets=("attn.q_proj",), dora=True, key=jr.key(0)))))
    assert {"attn.q_proj.weight", "attn.q_proj.down", "attn.q_proj.up", "attn.q_proj.magnitude", "attn.k_proj.weight"} <= roles


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (("attn.z_proj", "mlp.*"), r"no linear map of the blocks is called attn.z_proj; there are attn.k_proj, attn.o_proj,"),
        (("embed",), "is called embed; there are"),
        (("unembed",), "is called unembed; there are"),
        ((), "is called nothing at all"),
    ],
)
def test_a_pattern_that_hits_nothing_is_an_error_that_lists_the_roles(targets, words):
    with pytest.raises(ValueError, match=words):
        lm.add_lora(tiny("llama", n_layers=1), targets=targets, key=jr.key(0))


def test_what_cannot_be_done_is_said():
    model = tiny("llama", n_layers=1)
    adapted = lm.add_lora(model, targets=("mlp.*",), key=jr.key(0))
    with pytest.raises(ValueError, match="adapters already at blocks/0/mlp/gate_proj"):
        lm.add_lora(adapted, key=jr.key(0))
    with pytest.raises(ValueError, match=r"experts, which take no adapters: mlp.experts.down_proj"):
        lm.add_lora(tiny("mixtral", n_layers=1), targets=("*",), key=jr.key(0))
    with pytest.raises(ValueError, match="rank >= 1"):
        lm.add_lora(model, rank=0, key=jr.key(0))
    with pytest.raises(ValueError, match="no adapters: put some on"):
        lm.trainable_filter(model)
    with pytest.raises(ValueError, match=r"nothing here is called embedding; the roles are attn.k_proj.weight"):
        lm.trainable_filter(adapted, also=("embedding",))
    with pytest.raises(ValueError, match=r"embed.weight.values means packed numbers"):
        lm.trainable_filter(lm.quantised(adapted), also=("embed.weight.values",))


def test_what_is_trained_is_the_adapters_and_what_is_named():
    model = lm.add_lora(lm.quantised(tiny("llama", n_layers=1), "nf4", group=8), targets=("attn.q_proj",), dora=True, key=jr.key(0))
    chosen = {path for path, is_trained in leaves_by_path(lm.trainable_filter(model, also=("*norm.scale",))).items() if is_trained}
    assert chosen == {f"blocks/0/attn/q_proj/{name}" for name in ("down", "up", "magnitude")} | {
        "blocks/0/attn_norm/scale", "blocks/0/mlp_norm/scale", "norm/scale",
    }  # fmt: skip


# ------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_computes_the_same_without_adapters(kind):
    adapted = trained(tiny("gpt2", n_layers=1), **KINDS[kind])  # with biases
    merged = lm.merge(adapted)
    assert not adapters_of(merged)
    assert jax.tree.structure(merged) == jax.tree.structure(tiny("gpt2", n_layers=1))
    assert_near(logits_of(merged, TOKENS), logits_of(adapted, TOKENS), 2e-5)


def test_unmerging_brings_the_model_back_from_the_merged_one_and_the_adapters_alone():
    adapted = trained(tiny("llama", n_layers=1))
    alone = eqx.filter(adapted, lm.trainable_filter(adapted))
    back = lm.unmerge(lm.merge(adapted), alone)
    assert jax.tree.structure(back) == jax.tree.structure(adapted)
    assert_near(back, adapted, 1e-6)
    with pytest.raises(ValueError, match="DoRA cannot be unmerged"):
        lm.unmerge(lm.merge(adapted), trained(tiny("llama", n_layers=1), dora=True))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_merging_into_packed_weights_gives_arrays_and_packing_again_rounds_the_adapter_too(kind):
    group = {} if kind == "int8" else {"group": 8}
    adapted = trained(lm.quantised(tiny("llama", n_layers=1), kind, **group), dora=True)
    merged = lm.merge(adapted)
    assert merged.blocks[0].mlp.up_proj.weight.dtype == jnp.float32
    exact = logits_of(adapted, TOKENS)
    assert_near(logits_of(merged, TOKENS), exact, 5e-5)
    again = logits_of(lm.quantised(merged, kind, **group), TOKENS)
    assert 1e-3 < jnp.abs(again - exact).max() / jnp.abs(exact).max() < 0.5


def test_what_has_no_adapter_stays_packed_after_a_merge_until_it_is_dequantised(tmp_path):
    adapted = trained(lm.quantised(tiny("llama", n_layers=1), "nf4", group=8), targets=("attn.q_proj",))
    merged = lm.merge(adapted)
    with pytest.raises(ValueError, match=r"8 of this model are .*: lm.save_native keeps them as they are, lm.dequantised makes arrays"):
        lm.save_pretrained(merged, tmp_path)
    plain = lm.dequantised(merged)
    assert_near(logits_of(plain, TOKENS), logits_of(adapted, TOKENS), 2e-5)
    lm.save_pretrained(plain, tmp_path)
    assert eqx.tree_equal(lm.load_pretrained(tmp_path), plain)
    assert eqx.tree_equal(lm.dequantised(plain), plain)


def test_an_adapted_model_can_be_packed_and_generates_what_the_merged_one_does():
    adapted = trained(tiny("llama", n_layers=1))
    assert_near(logits_of(lm.quantised(adapted), TOKENS), logits_of(trained(lm.quantised(tiny("llama", n_layers=1))), TOKENS), 1e-6)
    prompts = {"prompts": [[5, 3, 9], [7, 1, 2, 8]], "max_new_tokens": 6}
    assert lm.generate(adapted, **prompts) == lm.generate(lm.merge(adapted), **prompts)


# ------------------------------------------------------------------------------------------- in flight


@pytest.mark.parametrize("targets", [("attn.*", "mlp.*"), ("attn.q_proj", "blocks/2/mlp/*")], ids=["all layers", "some layers"])
def test_a_scan_computes_what_the_loop_computes(targets):
    batch = packed_batch()
    adapted = trained(tiny("llama"), targets=targets, dropout=0.3)

    def logits(flight, key):
        flying = lm.put_on_flight(adapted, flight, lm.REFERENCE)
        return flying, flying.hidden(jnp.asarray(batch.tokens), facts_of(batch), key=key)[0]

    of = {name: eqx.filter_jit(logits)(Flight(layers=name), jr.key(3)) for name in ("loop", "scan")}
    assert [block.depth for block in of["scan"][0].blocks] == ([3] if targets[0] == "attn.*" else [2, 1])
    assert_near(of["scan"][1], of["loop"][1])
    assert jnp.abs(eqx.filter_jit(logits)(Flight(), None)[1] - of["loop"][1]).max() > 0.01  # the dropout was drawn


def test_dropout_zeroes_what_the_adapter_reads_and_keeps_its_mean():
    linear = tiny("llama", n_layers=1).blocks[0].attn.q_proj
    lora = eqx.tree_at(lambda each: each.up, lm.LoRA.init(linear, 3, 4.0, key=jr.key(0), dropout=0.4), jnp.ones((48, 3)))
    x = jnp.ones((4000, 24))
    drawn = eqx.tree_at(lambda each: each.key, lora, jr.key(1), is_leaf=lambda leaf: leaf is None)(x)
    assert jnp.std(drawn[:, 0]) > 0
    assert_near(jnp.mean(drawn, axis=0), lora(x)[0], 0.05)


def test_a_cast_flight_keeps_magnitudes_in_fp32():
    adapted = lm.add_lora(lm.quantised(tiny("llama", n_layers=1)), dora=True, key=jr.key(0))
    q_proj = lm.put_on_flight(adapted, Flight(dtype="bfloat16"), lm.REFERENCE).blocks[0].attn.q_proj
    assert (q_proj.down.dtype, q_proj.up.dtype, q_proj.base.weight.dtype) == (jnp.bfloat16,) * 3
    assert q_proj.magnitude.dtype == q_proj.base.weight.scales.dtype == jnp.float32
