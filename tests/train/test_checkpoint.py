import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from loguru import logger

from train.checkpoint import CheckpointError, Checkpoints, read_record

# Of a restore that fails on one leaf, Orbax leaves the reads of the others unawaited.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def params(seed: int = 0) -> dict:
    """One leaf of each kind a training state may hold."""
    key = jax.random.key(seed)
    return {
        "w": jax.random.normal(key, (7, 5)),
        "half": jax.random.normal(key, (3, 11), jnp.bfloat16),
        "blocks": ({"scale": jnp.full((5,), 1.5 + seed)}, {"scale": jnp.arange(13, dtype=jnp.int8), "bias": None}),
        "noise": jax.random.bits(key, (31, 67)),
        "mask": jnp.array([True, False, True]),
        "step": jnp.int32(40 + seed),
        "key": jax.random.split(key, 2),
        "wide": np.arange(3) + 2**40 + seed,  # int64, which jax itself would cut
    }


def abstract(tree: dict) -> dict:
    return jax.tree.map(lambda x: x if isinstance(x, np.ndarray) else jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def bits(tree: object) -> list[bytes]:
    def plain(x: jax.Array) -> np.ndarray:
        return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)

    return [plain(x).tobytes() for x in jax.tree.leaves(tree)]


def fill(folder: Path, steps: list[int]) -> None:
    with Checkpoints(folder, keep_latest=9) as checkpoints:
        for step in steps:
            checkpoints.save(step, {"model": params(step), "ema": params(-step)}, {"lr": step})


@pytest.fixture
def words() -> object:
    """What loguru said."""
    heard: list[str] = []
    handler = logger.add(heard.append, format="{level} {message}")
    yield heard
    logger.remove(handler)


# ------------------------------------------------------------------------------------------------------------ save, restore


def test_restored_equals_saved_bit_for_bit(tmp_path: Path) -> None:
    model = params()
    optimizer = optax.adamw(1e-3).init({"w": model["w"], "half": model["half"]})
    items = {"model": model, "optimizer": optimizer, "stateless": optax.sgd(0.1).init(model["w"])}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(40, items, {"config": {"lr": 0.1, "sizes": (1, 2)}})
    targets = {name: abstract(tree) for name, tree in items.items()}
    restored = Checkpoints(tmp_path).restore(targets)
    assert restored.step == 40
    assert bits(restored.items) == bits(items)
    assert jax.tree.structure(restored.items) == jax.tree.structure(items)
    assert [x.dtype for x in jax.tree.leaves(restored.items)] == [x.dtype for x in jax.tree.leaves(items)]
    assert restored.record == {"config": {"lr": 0.1, "sizes": [1, 2]}, "digests": restored.record["digests"]}
    assert read_record(tmp_path) == restored.record


def test_digest_and_checkpoint_are_equal_on_four_devices(tmp_path: Path) -> None:
    """Saved on one device, restored and digested on four, laid out over both kinds of mesh axes."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, {"m": {"a": jnp.arange(8.0 * 12).reshape(8, 12), "b": jnp.ones(5, jnp.bfloat16)}}, {})
    script = """
        import sys, jax, jax.numpy as jnp
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from train.checkpoint import Checkpoints
        from lm.digests import digest
        assert jax.device_count() == 4
        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind, kind))
            place = NamedSharding(mesh, P("y", "x"))
            target = {"a": jax.ShapeDtypeStruct((8, 12), jnp.float32, sharding=place),
                      "b": jax.ShapeDtypeStruct((5,), jnp.bfloat16, sharding=NamedSharding(mesh, P()))}
            restored = Checkpoints(sys.argv[1]).restore({"m": target})
            assert restored.items["m"]["a"].sharding == place
            assert digest(restored.items["m"]) == restored.record["digests"]["m"]
        print("equal")
    """
    done = run(script, str(tmp_path), JAX_NUM_CPU_DEVICES="4")
    assert done.stdout.strip() == "equal", done.stderr


def test_weights_load_alone(tmp_path: Path) -> None:
    fill(tmp_path, [2])
    restored = Checkpoints(tmp_path).restore({"model": abstract(params())})
    assert set(restored.items) == {"model"}
    assert bits(restored.items["model"]) == bits(params(2))


def test_arrays_may_be_donated_or_overwritten_right_after_save(tmp_path: Path) -> None:
    on_device, on_host = jnp.arange(1e6).reshape(1000, 1000), np.arange(500_000.0)
    expected = bits([on_device, on_host])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"model": [on_device, on_host]}, {})
        # On a CPU, while Orbax still looks at the buffer, jax copies it rather than give it away: either way is fine.
        jax.jit(lambda x: x * 0 - 1, donate_argnums=0)(on_device).block_until_ready()
        on_host[:] = -1
    target = [jax.ShapeDtypeStruct((1000, 1000), jnp.float32), np.zeros(500_000)]
    assert bits(Checkpoints(tmp_path).restore({"model": target}).items["model"]) == expected


def test_latest_survives_best_keeping_and_metrics_survive_restarts(tmp_path: Path) -> None:
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: 5.0, 6: 4.0}
    for step, loss in losses.items():
        with Checkpoints(tmp_path, keep_latest=2, keep_best=1) as checkpoints:  # a new process each time, so to say
            checkpoints.save(step, {"model": {"w": jnp.full((2, 3), step)}}, {}, metric=loss)
    assert Checkpoints(tmp_path).steps() == [2, 5, 6]
    assert Checkpoints(tmp_path).best_step() == 2


def test_saving_a_step_again(tmp_path: Path, words: list[str]) -> None:
    """Equal items are left as they are; others take the place, and later steps leave with the course they belong to."""
    fill(tmp_path, [2, 4, 6])
    fill(tmp_path, [4])
    assert Checkpoints(tmp_path).steps() == [2, 4, 6]
    with Checkpoints(tmp_path, keep_latest=9) as checkpoints:
        checkpoints.save(4, {"model": params(99)}, {})
    assert Checkpoints(tmp_path).steps() == [2, 4]
    assert {p.name for p in tmp_path.iterdir()} == {"2", "4", "replaced-4", "replaced-6"}
    assert bits(Checkpoints(tmp_path).restore({"model": abstract(params())}).items["model"]) == bits(params(99))
    assert any("step 6 set aside as" in line for line in words)


def test_a_wrong_tree_is_the_callers_mistake_and_no_damage(tmp_path: Path, words: list[str]) -> None:
    fill(tmp_path, [2, 4])
    wrong = abstract(params())
    wrong["w"] = jax.ShapeDtypeStruct((5, 7), jnp.float32)
    wrong["more"] = wrong.pop("mask")
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(ValueError, match=r"w is float32\[7,5\], not float32\[5,7\]") as caught:
        checkpoints.restore({"model": wrong})
    assert "mask (bool[3]) was saved but is not asked for" in str(caught.value)
    assert "more was not saved" in str(caught.value)
    with pytest.raises(ValueError, match=r"has the items \['ema', 'model'\], not \['optimizer'\]"):
        checkpoints.restore({"optimizer": wrong})
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 3 .* steps there: \[2, 4\]"):
        checkpoints.restore({}, step=3)
    assert words == []


def test_what_cannot_be_saved_is_refused_at_the_door(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "new") as checkpoints:
        with pytest.raises(TypeError, match=r"leaf 'a' is a float; a checkpoint holds arrays only"):
            checkpoints.save(1, {"model": {"a": 1.0}}, {})
        with pytest.raises(ValueError, match=r"without elements: leave out \['model/a'\]"):
            checkpoints.save(1, {"model": {"a": jnp.zeros((0, 3))}}, {})
        with pytest.raises(ValueError, match="must be something JSON can say"):
            checkpoints.save(1, {"model": {"a": jnp.zeros(3)}}, {"path": Path("x")})
        with pytest.raises(ValueError, match="may not be called"):
            checkpoints.save(1, {"record": {"a": jnp.zeros(3)}}, {})
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------------------------------------------- damage


def flip_byte(step: Path) -> None:
    """One bit of the noise in `model/noise`, which no compression can touch, and so stands in the files as it is in memory."""
    needle = np.asarray(params(int(step.name))["noise"])[3].tobytes()
    holding = [p for p in (step / "model").rglob("*") if p.is_file() and needle in p.read_bytes()]
    assert holding
    for path in holding:
        raw = bytearray(path.read_bytes())
        raw[raw.index(needle) + 5] ^= 1
        path.write_bytes(raw)


def truncate(step: Path) -> None:
    """The file that holds most of the arrays, to its half."""
    data = max((p for p in (step / "model").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])


def remove_item(step: Path) -> None:
    (step / "model").rename(step.parent / "gone")


def forge_record(step: Path) -> None:
    path = step / "record" / "metadata"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"lr": 5}))


def cut_record(step: Path) -> None:
    path = step / "record" / "metadata"
    path.write_text(path.read_text()[:-3])


def forge_seal(step: Path) -> None:
    path = step / "seal" / "metadata"
    path.write_text(path.read_text().replace("bool[3]", "bool[4]"))


HARM = [flip_byte, truncate, remove_item, forge_record, cut_record, forge_seal]


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_step_is_reported_and_the_one_before_taken(harm, tmp_path: Path, words: list[str]) -> None:
    fill(tmp_path, [2, 4, 6])
    harm(tmp_path / "6")
    with Checkpoints(tmp_path, keep_latest=2) as checkpoints:
        restored = checkpoints.restore({"model": abstract(params())})
        assert (restored.step, restored.record["lr"]) == (4, 4)
        assert bits(restored.items["model"]) == bits(params(4))
        assert any(line.startswith("ERROR checkpoint of step 6 in") and "is damaged" in line for line in words)
        with pytest.raises(CheckpointError, match="step 6"):
            checkpoints.restore({"model": abstract(params())}, step=6)
        assert checkpoints.steps() == [2, 4, 6]  # reading has changed nothing

        # Trained again to step 6 it is the same step 6: still it must be written, and not be taken for the one there.
        checkpoints.save(6, {"model": params(6), "ema": params(-6)}, {"lr": 6})
        checkpoints.wait()
        assert checkpoints.steps() == [4, 6]
        assert (tmp_path / "damaged-6").is_dir()
        assert bits(checkpoints.restore({"model": abstract(params())}).items["model"]) == bits(params(6))


def test_a_flipped_byte_that_orbax_lets_pass_is_named_by_leaf(tmp_path: Path) -> None:
    fill(tmp_path, [2])
    flip_byte(tmp_path / "2")
    with pytest.raises(CheckpointError, match=r"1 of the 9 leaves of 'model' are not what was saved: noise"):
        Checkpoints(tmp_path).restore({"model": abstract(params())})


def test_when_all_are_damaged_each_is_named_and_none_is_touched(tmp_path: Path) -> None:
    fill(tmp_path, [2, 4])
    truncate(tmp_path / "2")
    cut_record(tmp_path / "4")
    with pytest.raises(CheckpointError, match=r"Tried step 4: its record cannot be read .*; step 2: "):
        Checkpoints(tmp_path).restore({"model": abstract(params())})
    assert Checkpoints(tmp_path).steps() == [2, 4]
    assert read_record(tmp_path)["lr"] == 2  # step 4's is damaged, step 2's arrays are


# ------------------------------------------------------------------------------------------------------------------ endings


def run(script: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    root = Path(__file__).parents[2]
    environ = {**os.environ, "JAX_PLATFORMS": "cpu", **environ}
    return subprocess.run(command, cwd=root, env=environ, capture_output=True, text=True, timeout=300)


def test_the_last_save_survives_an_exception(tmp_path: Path) -> None:
    script = """
        import sys, jax.numpy as jnp
        from train.checkpoint import Checkpoints
        with Checkpoints(sys.argv[1]) as checkpoints:
            checkpoints.save(5, {"model": {"w": jnp.ones((512, 1031))}}, {})
            raise KeyError("the run's own")
    """
    done = run(script, str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith('KeyError: "the run\'s own"'), done.stderr
    target = {"w": jax.ShapeDtypeStruct((512, 1031), jnp.float32)}
    assert Checkpoints(tmp_path).restore({"model": target}).step == 5


def test_a_killed_save_leaves_the_earlier_step(tmp_path: Path, words: list[str]) -> None:
    """Killed as soon as the half-written folder shows, with enough data that it cannot be whole yet."""
    script = """
        import sys, jax.numpy as jnp
        from train.checkpoint import Checkpoints
        checkpoints = Checkpoints(sys.argv[1])
        checkpoints.save(1, {"model": {"w": jnp.ones((64, 31))}}, {})
        checkpoints.wait()
        checkpoints.save(2, {"model": {"w": jnp.ones((64, 1024, 1031))}}, {})
        checkpoints.wait()
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE)
    end = time.monotonic() + 300
    while not (half := list(tmp_path.glob("2.*"))) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert half, errors
    target = {"w": jax.ShapeDtypeStruct((64, 31), jnp.float32)}
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]
        assert checkpoints.restore({"model": target}).step == 1
        checkpoints.save(2, {"model": {"w": jnp.ones((64, 31))}}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]
    assert any("never finished" in line for line in words)


def test_a_save_that_cannot_be_written_is_an_error_and_spares_the_earlier(tmp_path: Path) -> None:
    """The limit on file size fails a write as a full disk does, and needs no full disk."""
    script = """
        import resource, sys, jax, jax.numpy as jnp
        from train.checkpoint import Checkpoints
        with Checkpoints(sys.argv[1], keep_latest=1) as checkpoints:
            checkpoints.save(1, {"model": {"w": jnp.ones((64, 31))}}, {})
            checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
            checkpoints.save(2, {"model": {"w": jax.random.normal(jax.random.key(0), (512, 1031))}}, {})
    """
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    done = run(script, str(tmp_path))
    assert done.returncode == 1
    last = done.stderr.rstrip().splitlines()[-1]
    assert "CheckpointError" in last, done.stderr
    assert "the checkpoint of step 2 could not be written to" in last
    assert "steps still whole there: [1]" in last
    target = {"w": jax.ShapeDtypeStruct((64, 31), jnp.float32)}
    assert Checkpoints(tmp_path).restore({"model": target}).step == 1
