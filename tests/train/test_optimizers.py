import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import tiny

from lm.base import leaves_by_path
from train.optimizers import (
    OptimizerConfig,
    ScheduleConfig,
    averaged_by_optimizer,
    build_optimizer,
    is_matrix,
    learning_rate,
)

MODEL = {"name": "qwen3", "attention_bias": True, "tied": False, "n_layers": 2}


def random_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), tree)


def directions(config, params, gradients):
    """The directions of several steps at the same parameters, as one program: updates are against them."""
    optimizer = build_optimizer(config)

    @jax.jit
    def run(params, gradients):
        state, out = optimizer.init(params), []
        for gradient in gradients:
            updates, state = optimizer.update(gradient, state, params, learning_rate=1.0)
            out.append(jax.tree.map(jnp.negative, updates))
        return out, state

    return run(params, gradients)


# ------------------------------------------------------------------------------------------- adamw


def test_adamw_is_the_paper_s_written_out():
    """Loshchilov and Hutter 2019, algorithm 2, in float64 numpy, parameters moving."""
    config = OptimizerConfig(name="adamw", beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.3)
    rng = np.random.default_rng(0)
    params = {
        "embed": {"weight": rng.normal(size=(7, 3))},
        "blocks": ({"up": {"weight": rng.normal(size=(5, 4)), "bias": rng.normal(size=5)}},),
    }
    ours = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    optimizer = build_optimizer(config)
    state, update = optimizer.init(ours), jax.jit(optimizer.update)

    decay = {"embed": {"weight": 0.0}, "blocks": ({"up": {"weight": 0.3, "bias": 0.0}},)}
    mean = square = jax.tree.map(np.zeros_like, params)
    for step in range(1, 6):
        rate = 0.1 / step
        gradient = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape) * 0.01, params)
        mean = jax.tree.map(lambda m, g: 0.8 * m + 0.2 * g, mean, gradient)
        square = jax.tree.map(lambda v, g: 0.9 * v + 0.1 * g**2, square, gradient)
        params = jax.tree.map(
            lambda p, m, v, d, step=step, rate=rate: p - rate * (m / (1 - 0.8**step) / (np.sqrt(v / (1 - 0.9**step)) + 1e-3) + d * p),
            params, mean, square, decay,
        )  # fmt: skip
        updates, state = update(jax.tree.map(jnp.float32, gradient), state, ours, learning_rate=rate)
        ours = optax.apply_updates(ours, updates)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), ours, params)  # fp32 against float64


# ------------------------------------------------------------------------------------------- which leaf is whose


def matrices_by_hand():
    maps = [f"attn/{name}_proj" for name in "qkvo"] + [f"mlp/{name}_proj" for name in ("gate", "up", "down")]
    return {f"blocks/{layer}/{name}/weight" for layer in range(2) for name in maps}


def test_matrices_are_the_linear_maps_inside_blocks():
    leaves = leaves_by_path(tiny(**MODEL))
    assert {path for path, leaf in leaves.items() if is_matrix(path, leaf)} == matrices_by_hand()
    assert {"embed/weight", "unembed/weight", "norm/scale", "blocks/0/attn/q_proj/bias", "blocks/1/attn/k_norm/scale"} <= set(leaves)


@pytest.mark.parametrize("name", ["adamw", "muon", "normuon", "soap", "lion", "adafactor", "schedule_free"])
def test_weight_decay_pulls_on_the_matrices_and_nothing_else(name):
    params = tiny(**MODEL)
    zero = jax.tree.map(jnp.zeros_like, params)
    settings = {"weight_decay": 0.3, "weight_decay_of": {"mlp.*": 0.2, "blocks/1/mlp/up_proj/weight": 0.0, "embed.weight": 0.1}}
    (direction,), _ = directions(OptimizerConfig(name=name, **settings), params, [zero])
    before = leaves_by_path(params)
    for path, leaf in leaves_by_path(direction).items():
        decay = 0.2 if "/mlp/" in path else 0.1 if path == "embed/weight" else 0.3 if path in matrices_by_hand() else 0.0
        decay = 0.0 if path == "blocks/1/mlp/up_proj/weight" else decay
        # schedule_free: the update of the average's and the moving sequence's mixture, found as a difference of fp32 numbers
        np.testing.assert_allclose(leaf, decay * before[path], rtol=1e-5, atol=1e-6, err_msg=path)


def test_cautious_decay_pulls_only_where_the_step_goes_towards_0():
    """AdamW's first direction is the gradient's sign. Parameters 2, -3, 4, -5 with directions 1, 1, -1, -1: the step takes 2 and -5 nearer
    to 0, and only they are pulled. At rate 0.1 and decay 0.5: 2 - 0.1 (1 + 1) = 1.8, -3 - 0.1 = -3.1, 4.1, -5 + 0.1 (1 + 2.5) = -4.65."""
    start, gradient = {"w": jnp.array([[2.0, -3.0, 4.0, -5.0]])}, {"w": np.array([[3.0, 7.0, -0.5, -2.0]])}
    config = OptimizerConfig(name="adamw", cautious=True, weight_decay_of={"w": 0.5})
    (moved,), _, _ = course(config, start, [gradient], [0.1])
    np.testing.assert_allclose(moved, [[1.8, -3.1, 4.1, -4.65]], rtol=1e-5)


def test_muon_moves_the_matrices_and_adamw_the_rest():
    params = tiny(**MODEL)
    gradients = [random_like(params, seed) for seed in (1, 2)]
    (_, muon), state = directions(OptimizerConfig(name="muon"), params, gradients)
    (_, adamw), _ = directions(OptimizerConfig(name="adamw"), params, gradients)
    muon, adamw = leaves_by_path(muon), leaves_by_path(adamw)
    for path in muon:
        if path in matrices_by_hand():
            assert not np.allclose(muon[path], adamw[path], atol=0.1), path
        else:
            np.testing.assert_allclose(muon[path], adamw[path], rtol=1e-5, atol=1e-6, err_msg=path)
    momenta = [path for path in leaves_by_path(state) if "momentum" in path]
    assert {path[path.index("blocks/") :] for path in momenta} == matrices_by_hand()
    assert len(leaves_by_path(state)) == 14 + 2 * (len(muon) - 14) + 1  # a momentum a matrix, AdamW's two moments for the rest, its count


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "adafactor"])
def test_a_factor_on_the_learning_rate_is_its_roles_own(name):
    params = tiny(**MODEL)
    gradients = [random_like(params, seed) for seed in (1, 2)]
    (_, plain), _ = directions(OptimizerConfig(name=name), params, gradients)
    factors = {"embed.weight": 0.25, "blocks/0/*": 3.0, "attn.k_norm.scale": 0.0}  # of two that mean one leaf, the last counts
    (_, scaled), _ = directions(OptimizerConfig(name=name, learning_rate_of=factors), params, gradients)
    plain = leaves_by_path(plain)
    for path, leaf in leaves_by_path(scaled).items():
        factor = 0.25 if path == "embed/weight" else 0.0 if "k_norm" in path else 3.0 if path.startswith("blocks/0/") else 1.0
        np.testing.assert_allclose(leaf, factor * plain[path], rtol=1e-5, atol=1e-7, err_msg=path)


@pytest.mark.parametrize("name", ["muon", "schedule_free"])
def test_the_embeddings_rate_is_a_factor_of_its_own_that_roles_win_over(name):
    params = tiny(**MODEL)
    gradients = [random_like(params, seed) for seed in (1, 2)]

    def updates(**settings):
        (_, found), _ = directions(OptimizerConfig(name=name, **settings), params, gradients)
        return leaves_by_path(found)

    plain, ten, won_over = updates(), updates(embed_rate=10.0), updates(embed_rate=10.0, learning_rate_of={"embed.*": 2.0})
    for path, leaf in plain.items():
        embedding = path == "embed/weight"
        np.testing.assert_allclose(ten[path], (10 if embedding else 1) * leaf, rtol=1e-4, atol=1e-6, err_msg=path)
        np.testing.assert_allclose(won_over[path], (2 if embedding else 1) * leaf, rtol=1e-4, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("field", ["learning_rate_of", "weight_decay_of"])
def test_a_role_that_is_not_there_is_an_error_that_lists_them(field):
    with pytest.raises(
        ValueError, match=rf"{field}: nothing here is called attention\.\*; the roles are attn\.k_norm\.scale, .*embed\.weight"
    ):
        build_optimizer(OptimizerConfig(**{field: {"attention.*": 1.0, "embed.weight": 0.5}})).init(tiny(**MODEL))
    with pytest.raises(ValueError, match=rf"{field} must be 0 or more for each role, got {{'norm': -1.0}}"):
        OptimizerConfig(**{field: {"norm": -1.0, "embed.weight": 1}})


# ------------------------------------------------------------------------------------------- lion, adafactor, schedule-free


def course(config, start, gradients, rates):
    """Parameters after each of several steps."""
    optimizer, params, seen = build_optimizer(config), jax.tree.map(jnp.float32, start), []
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for gradient, rate in zip(gradients, rates, strict=True):
        updates, state = update(jax.tree.map(jnp.float32, gradient), state, params, learning_rate=rate)
        params = optax.apply_updates(params, updates)
        seen.append(params["w"])
    return seen, state, params


def some_gradients(shape, steps, seed=0):
    rng = np.random.default_rng(seed)
    return {"w": rng.normal(size=shape)}, [{"w": rng.normal(size=shape)} for _ in range(steps)]


def test_lion_is_the_paper_s_written_out():
    """Chen et al. 2023, algorithm 2, its sign times 0.2."""
    start, gradients = some_gradients((5, 4), 6)
    rates = [0.1 / step for step in range(1, 7)]
    config = OptimizerConfig(name="lion", beta1=0.8, beta2=0.9, weight_decay_of={"w": 0.3})
    seen, _, _ = course(config, start, gradients, rates)
    w, mean = start["w"], 0.0
    for gradient, rate, ours in zip(gradients, rates, seen, strict=True):
        w = w - rate * (0.2 * np.sign(0.8 * mean + 0.2 * gradient["w"]) + 0.3 * w)
        mean = 0.9 * mean + 0.1 * gradient["w"]
        np.testing.assert_allclose(ours, w, rtol=2e-5, atol=2e-6)


def test_adafactor_is_the_paper_s_written_out_and_keeps_a_row_and_a_column():
    """Shazeer and Stern 2018, algorithm 4 without relative steps: decay 1 - t^-0.8, updates clipped to root mean square 1; times 0.2."""
    shape = (130, 140)  # matrices below 128 are not factored
    start, gradients = some_gradients(shape, 4)
    rates = [0.1, 0.05, 0.02, 0.3]
    seen, state, _ = course(OptimizerConfig(name="adafactor"), start, gradients, rates)
    w, row, column = start["w"], np.zeros(shape[0]), np.zeros(shape[1])
    for step, (gradient, rate, ours) in enumerate(zip(gradients, rates, seen, strict=True), start=1):
        decay, square = 1 - step**-0.8, gradient["w"] ** 2 + 1e-30
        row = decay * row + (1 - decay) * square.mean(1)
        column = decay * column + (1 - decay) * square.mean(0)
        update = gradient["w"] / np.sqrt(np.outer(row, column) / row.mean())
        w = w - rate * 0.2 * update / max(1.0, np.sqrt(np.mean(update**2)))
        np.testing.assert_allclose(ours, w, rtol=2e-5, atol=2e-6)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 2 * sum(shape)


def test_schedule_free_is_the_paper_s_written_out_and_its_average_is_that_of_z():
    """Defazio et al. 2024, algorithm 1, and x as what it means: Σ γ² z / Σ γ²."""
    start, gradients = some_gradients((5, 4), 7)
    rates = [0.02, 0.05, 0.1, 0.1, 0.1, 0.1, 0.1]
    config = OptimizerConfig(name="schedule_free", beta1=0.7, beta2=0.9, eps=1e-3, weight_decay_of={"w": 0.3})
    seen, state, params = course(config, start, gradients, rates)
    x = y = z = start["w"]
    square, zs = 0.0, []
    for step, (gradient, rate, ours) in enumerate(zip(gradients, rates, seen, strict=True), start=1):
        square = 0.9 * square + 0.1 * gradient["w"] ** 2
        z = z - rate * (gradient["w"] / (np.sqrt(square / (1 - 0.9**step)) + 1e-3) + 0.3 * y)
        zs.append(z)
        x = np.average(zs, axis=0, weights=np.square(rates[:step]))
        y = 0.3 * z + 0.7 * x
        np.testing.assert_allclose(ours, y, rtol=5e-5, atol=5e-6)
    np.testing.assert_allclose(averaged_by_optimizer(state, params)["w"], x, rtol=5e-5, atol=5e-6)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) <= 2 * 20 + 3  # AdamW's memory, and three numbers


def test_schedule_free_without_an_average_is_refused_with_the_settings():
    with pytest.raises(ValueError, match="schedule_free needs beta1 above 0"):
        OptimizerConfig(name="schedule_free", beta1=0)


def test_schedule_free_at_rate_0_stays_where_it_is():
    start, gradients = some_gradients((5, 4), 2)
    seen, _, _ = course(OptimizerConfig(name="schedule_free", weight_decay=0.1), start, gradients, [0.0, 0.0])
    np.testing.assert_allclose(seen[-1], start["w"], rtol=1e-5)


def test_all_optimizers_move_about_as_far_at_one_learning_rate():
    """Root mean square of an update of random gradients, in learning rates: 0.2 where it is made so, AdamW's own at β 0.9, 0.95."""
    start, gradients = some_gradients((140, 130), 30)
    for name in ("adamw", "muon", "normuon", "soap", "lion", "adafactor"):
        seen, _, _ = course(OptimizerConfig(name=name, weight_decay=0.0), start, gradients, [1.0] * 30)
        rms = float(jnp.sqrt(jnp.mean((seen[-1] - seen[-2]) ** 2)))
        assert 0.1 < rms < 0.4, (name, rms)


# ------------------------------------------------------------------------------------------- schedules

SHAPES = ["linear", "cosine", "constant", "wsd"]


def rates(total, **settings):
    at = learning_rate(ScheduleConfig(**({"peak": 3.0} | settings)), total)
    return np.array([at(step) for step in range(total)])


@pytest.mark.parametrize("total", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5, 0.99])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_rate_is_above_0_and_at_most_the_peak_and_the_peak_is_reached(shape, warmup, total):
    all_rates = rates(total, shape=shape, warmup=warmup)
    assert np.all(np.isfinite(all_rates))
    assert np.all(all_rates > 0)
    assert all_rates.max() == 3.0
    top = int(np.argmax(all_rates))
    assert np.all(np.diff(all_rates[: top + 1]) > 0)
    assert np.all(np.diff(all_rates[top:]) <= 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_warm_up_is_a_line_from_0_to_the_peak(shape):
    np.testing.assert_allclose(rates(100, shape=shape, warmup=0.1)[:10], 3.0 * np.arange(1, 11) / 10)


@pytest.mark.parametrize("final", [0.0, 0.25])
def test_after_the_warm_up_each_shape_is_itself(final):
    rest = {shape: rates(100, shape=shape, warmup=0.2, final=final, decay=0.3)[20:] / 3.0 for shape in SHAPES}
    np.testing.assert_array_equal(rest["constant"], 1.0)
    np.testing.assert_allclose(rest["linear"], 1 - (1 - final) * np.arange(80) / 80)
    np.testing.assert_allclose(rest["cosine"], final + (1 - final) * (1 + np.cos(np.pi * np.arange(80) / 80)) / 2)
    assert rest["cosine"][40] == pytest.approx((1 + final) / 2)
    np.testing.assert_array_equal(rest["wsd"][:51], 1.0)  # flat, and then 30 steps of falling
    np.testing.assert_allclose(rest["wsd"][50:], 1 - (1 - final) * np.arange(30) / 30)


@pytest.mark.parametrize("shape", ["linear", "cosine", "wsd"])
def test_the_last_step_is_one_short_of_the_final_rate(shape):
    at = learning_rate(ScheduleConfig(shape=shape, peak=3.0, final=0.1), 50)
    assert at(50) == pytest.approx(0.3)  # a step that is never taken
    assert 0.3 < at(49) < 0.7
