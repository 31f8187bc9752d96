"""Models in several files: written and read, and what an index can get wrong."""

import json
import os
import resource
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny import tiny

import lm
from lm.hf import abstract
from lm.models.llama import Llama, LlamaConfig

ROOT = Path(__file__).parents[2]
INDEX = "model.safetensors.index.json"
LIMIT = 10_000  # bytes; the embedding is 97 · 24 · 4 = 9,312, all of the model 77,856


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def files(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path):
    lm.save_pretrained(tiny("llama"), tmp_path, max_shard_bytes=LIMIT)
    return tmp_path


def change_index(folder, change):
    place = folder / INDEX
    index = json.loads(place.read_text())
    change(index["weight_map"])
    place.write_text(json.dumps(index))


def test_shards_are_filled_to_the_limit_and_come_back(folder):
    model = tiny("llama")
    index = json.loads((folder / INDEX).read_text())
    names = sorted(set(index["weight_map"].values()))
    n = len(names)
    assert n > 3
    assert names == [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    assert files(folder) == ["config.json", *names, INDEX]
    sizes = []
    for name in names:
        tensors = load_file(folder / name)
        assert tensors.keys() == {key for key, file in index["weight_map"].items() if file == name}
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
        with safe_open(folder / name, framework="np") as file:
            assert file.metadata() == {"format": "pt"}
    assert max(sizes) <= LIMIT
    assert sum(sizes) == index["metadata"]["total_size"] == 4 * model.n_params
    assert min(one + other for one, other in pairwise(sizes)) > LIMIT // 2
    same(lm.load_pretrained(folder), model)


def test_a_tensor_above_the_limit_has_a_file_to_itself(tmp_path):
    model = tiny("llama")
    lm.save_pretrained(model, tmp_path, max_shard_bytes=1)
    assert len(files(tmp_path)) == 2 + len(jax.tree.leaves(model))
    same(lm.load_pretrained(tmp_path), model)


def test_tensors_of_two_widths_lie_aligned_in_one_file(tmp_path):
    model = tiny("llama", vocab=3, d_model=6, n_heads=1, n_kv_heads=1, head_dim=2, d_ff=1)
    model = jax.tree.map(lambda leaf: leaf if leaf.ndim == 1 else leaf.astype("bfloat16"), model)
    lm.save_pretrained(model, tmp_path)
    raw = (tmp_path / "model.safetensors").read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n])
    del header["__metadata__"]
    assert n % 8 == 0
    assert all(entry["data_offsets"][0] % {"F32": 4, "BF16": 2}[entry["dtype"]] == 0 for entry in header.values())
    assert {entry["dtype"] for entry in header.values()} == {"F32", "BF16"}
    same(lm.load_pretrained(tmp_path), model)


def test_a_model_takes_the_place_of_another_whatever_their_files(folder):
    (folder / "tokenizer.json").write_text("{}")
    one = tiny("llama", seed=1)
    lm.save_pretrained(one, folder)
    assert files(folder) == ["config.json", "model.safetensors", "tokenizer.json"]
    same(lm.load_pretrained(folder), one)
    two = tiny("llama", seed=2)
    lm.save_pretrained(two, folder, max_shard_bytes=2 * LIMIT)
    assert "model.safetensors" not in files(folder)
    same(lm.load_pretrained(folder), two)
    lm.save_pretrained(one, folder, max_shard_bytes=LIMIT)  # more shards: those of before would be left over
    same(lm.load_pretrained(folder), one)


def test_a_full_disk_in_the_middle_leaves_what_was_there(folder):
    """A limit on file size stands in for a full disk. Three shards are below it; the fourth has to hold a matrix that is not."""
    before = files(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, limits[1]))
    try:
        with pytest.raises(OSError, match=r"model-00004-of-00012\.safetensors could not be written .*is the disk full\?"):
            lm.save_pretrained(tiny("llama", seed=1, n_layers=2, d_ff=128), folder, max_shard_bytes=LIMIT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(folder) == before
    same(lm.load_pretrained(folder), tiny("llama"))


def test_what_a_killed_process_left_is_removed_by_the_next(folder):
    (folder / ".model-00007-of-00031.safetensors.writing").write_bytes(b"half a shard")
    same(lm.load_pretrained(folder), tiny("llama"))
    lm.save_pretrained(tiny("llama"), folder)
    assert files(folder) == ["config.json", "model.safetensors"]


def test_a_truncated_shard_is_named(folder):
    file = max(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{file.name} is not a whole safetensors file"):
        lm.load_pretrained(folder)


def test_missing_and_left_over_tensors_of_shards_are_listed_together(folder):
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    file = folder / weight_map["model.norm.weight"]
    tensors = load_file(file)
    tensors["model.norm.scale"] = tensors.pop("model.norm.weight")
    save_file(tensors, file)
    change_index(folder, lambda weight_map: weight_map.pop("model.norm.weight"))
    with pytest.raises(ValueError, match="does not hold the model") as caught:
        lm.load_pretrained(folder)
    assert str(caught.value).splitlines()[1:] == ["  missing: model.norm.weight (24,)", "  left over: model.norm.scale"]


def test_an_index_that_names_what_its_file_does_not_hold_is_refused(folder):
    change_index(folder, lambda weight_map: weight_map.update({"model.norm.weight": "model-00001-of-00009.safetensors"}))
    with pytest.raises(FileNotFoundError, match=r"names files that are not in .*: model-00001-of-00009.safetensors"):
        lm.load_pretrained(folder)
    first = min(path.name for path in folder.glob("*.safetensors"))
    change_index(folder, lambda weight_map: weight_map.update({"model.norm.weight": first}))
    with pytest.raises(ValueError, match=f"names tensors that their files do not hold:\n  model.norm.weight in {first}"):
        lm.load_pretrained(folder)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/model.safetensors", "sub/model.safetensors", "model.bin", ".."])
def test_an_index_that_leads_elsewhere_is_refused(folder, name):
    (folder.parent / "other").mkdir(exist_ok=True)
    save_file({"model.norm.weight": np.ones(24, np.float32)}, folder.parent / "other" / "model.safetensors")
    change_index(folder, lambda weight_map: weight_map.update({"model.norm.weight": name}))
    with pytest.raises(ValueError, match=r"expected names of \.safetensors files in its own folder"):
        lm.load_pretrained(folder)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {"model.norm.weight": 3}}'])
def test_an_index_without_its_map_is_refused(folder, content):
    (folder / INDEX).write_text(content)
    with pytest.raises(ValueError, match=r"index.json has no weight_map: expected"):
        lm.load_pretrained(folder)


def test_two_models_in_one_folder_are_refused(folder):
    lm.save_pretrained(tiny("llama"), folder / "single")
    (folder / "single" / "model.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds both model.safetensors and model.safetensors.index.json: which is the model\?"):
        lm.load_pretrained(folder)


ON_FOUR_DEVICES = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P, SingleDeviceSharding
import lm
folder = sys.argv[1]
assert len(jax.devices()) == 4
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
plain = lm.load_pretrained(folder)

def rule(path):
    return NamedSharding(mesh, P("a", "b") if path.endswith("proj/weight") else P())

sharded = lm.load_pretrained(folder, dtype=jnp.bfloat16, sharding=rule)
for path, leaf in lm.base.leaves_by_path(sharded).items():
    assert leaf.sharding == rule(path), path
weight = sharded.blocks[1].mlp.up_proj.weight
assert weight.addressable_shards[0].data.shape == (20, 12), weight.addressable_shards
jax.tree.map(lambda one, other: np.testing.assert_array_equal(one, other.astype(jnp.bfloat16)), sharded, plain)

there = lm.load_pretrained(folder, sharding=SingleDeviceSharding(jax.devices()[3]))
assert all(leaf.devices() == {jax.devices()[3]} for leaf in jax.tree.leaves(there))

lm.save_pretrained(sharded, folder + "/again", max_shard_bytes=5_000)
jax.tree.map(np.testing.assert_array_equal, lm.load_pretrained(folder + "/again"), sharded)

sys.path += ["tests", "tests/lm"]
from test_hf_names import EACH, toy
experts = toy()
across = jax.device_put(experts, NamedSharding(mesh, P(None, None, "b")))
lm.hf.save_folder(across, EACH, Path(folder) / "experts")
back = lm.hf.load_weights(jax.eval_shape(toy), EACH, Path(folder) / "experts", sharding=NamedSharding(mesh, P(None, None, "a")))
assert all(leaf.addressable_shards[0].data.shape == (3, 5, 2) for leaf in jax.tree.leaves(back))
jax.tree.map(np.testing.assert_array_equal, back, experts)
print("whole")
"""


def test_arrays_go_straight_onto_their_sharding_and_back_into_files(folder):
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", ON_FOUR_DEVICES, str(folder)],
        cwd=ROOT,
        env=os.environ | devices,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "whole\n"


MEASURE = """
import sys
import jax, jax.numpy as jnp
import lm

def resident(what):
    with open("/proc/self/status") as status:
        return 1024 * int(next(line for line in status if line.startswith(what)).split()[1])

folder, task = sys.argv[1:]
jax.block_until_ready(jnp.ones(3, jnp.bfloat16) + 1)
from lm.models import architecture_of  # all modules are here now
if task == "load":
    before = resident("VmRSS")
    model = lm.load_pretrained(folder, dtype=jnp.bfloat16)
else:
    model = lm.load_pretrained(folder, dtype=jnp.bfloat16)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak
    before = resident("VmRSS")
    lm.save_pretrained(model, folder + "/again", dtype=jnp.float32)
jax.block_until_ready(model)
print(2 * model.n_params, resident("VmHWM") - before)
"""


def grown(folder, task) -> tuple[int, int]:
    """(bytes of the parameters in bf16, bytes by which the process grew at its peak)."""
    command = [sys.executable, "-c", MEASURE, str(folder), task]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    n_bytes, peak = map(int, done.stdout.split())
    return n_bytes, peak


OTHERS = 24 * 2**20  # what else a process takes meanwhile: headers, the abstract tree, the allocator's slack


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux for the peak of resident memory")
@pytest.mark.parametrize("size", ["small", pytest.param("large", marks=pytest.mark.heavy)])
def test_memory_is_the_parameters_and_one_tensor(tmp_path, size):
    """fp32 files, half as much in bf16 memory; pages of mapped files count as memory here."""
    d_model, n_layers = {"small": (512, 12), "large": (1024, 8)}[size]
    d_ff, vocab = 4 * d_model, 8 * d_model
    config = LlamaConfig(
        vocab=vocab, d_model=d_model, n_layers=n_layers, n_heads=8, n_kv_heads=4, head_dim=d_model // 8, d_ff=d_ff, context=64, tied=True
    )
    skeleton = abstract(Llama.init, config)
    lm.save_pretrained(jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, np.float32), skeleton), tmp_path, max_shard_bytes=50_000_000)
    largest = 4 * vocab * d_model  # bytes of the embedding in the file
    n_bytes, peak = grown(tmp_path, "load")
    print(f"{size}: parameters {n_bytes / 2**20:.0f} MiB, one tensor {largest / 2**20:.0f} MiB, peak {peak / 2**20:.0f} MiB")
    assert n_bytes + largest + OTHERS < 0.9 * 3 * n_bytes  # or the next line would say nothing: the files mapped as well
    assert 0.9 * n_bytes < peak < n_bytes + largest + OTHERS  # some of the arrays lie where imports have left room
    _, peak = grown(tmp_path, "save")
    print(f"{size}: saving takes {peak / 2**20:.0f} MiB more")
    assert peak < 2 * largest + OTHERS
