"""The rows of a table of names: what a tensor of the file is to our leaves, both ways."""

from types import SimpleNamespace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lm.base import AbstractLM
from lm.hf import Stored, expert, load_weights, packed, part, save_folder, transposed

EXPERTS, D_FF, D_MODEL = 3, 5, 4


class Leaf(eqx.Module):
    weight: Any
    bias: Any = None


class MoE(eqx.Module):
    gate_proj: Leaf
    up_proj: Leaf


class Block(eqx.Module):
    moe: MoE


class Toy(AbstractLM):
    """A tree shaped like a model's, with experts in it, and nothing to compute."""

    blocks: tuple[Block, ...]
    embed: None = None

    @property
    def config(self) -> Any:
        return SimpleNamespace(to_hf=lambda: {"model_type": "toy"})

    def hidden(self, tokens, facts=None, cache=None, *, key=None):
        raise NotImplementedError

    @property
    def unembedding(self):
        raise NotImplementedError


def toy(bias: bool = False) -> Toy:
    rng = np.random.default_rng(0)

    def leaf() -> Leaf:
        return Leaf(*(jnp.asarray(rng.normal(size=shape)) for shape in ((EXPERTS, D_FF, D_MODEL), (EXPERTS, D_FF))[: 1 + bias]))

    return Toy(tuple(Block(MoE(leaf(), leaf())) for _ in range(2)))


def there_and_back(model: Toy, names: dict, folder) -> dict[str, np.ndarray]:
    """The tensors of the file, after a look that reading it gives the model."""
    save_folder(model, names, folder)
    loaded = load_weights(jax.eval_shape(lambda: model), names, folder)
    assert jax.tree.structure(loaded) == jax.tree.structure(model)
    jax.tree.map(np.testing.assert_array_equal, loaded, model)
    return load_file(folder / "model.safetensors")


EACH = {f"moe.{name}.weight": expert(f"layers.{{i}}.experts.{{e}}.{name}.weight") for name in ("gate_proj", "up_proj")}
KEYS = [f"layers.{i}.experts.{e}.{name}.weight" for i in range(2) for e in range(EXPERTS) for name in ("gate_proj", "up_proj")]


def test_each_expert_is_a_tensor_of_the_file(tmp_path):
    model = toy()
    tensors = there_and_back(model, EACH, tmp_path)
    assert sorted(tensors) == sorted(KEYS)
    np.testing.assert_array_equal(tensors["layers.1.experts.2.up_proj.weight"], model.blocks[1].moe.up_proj.weight[2])


def test_missing_experts_are_listed_each(tmp_path):
    save_folder(toy(), EACH, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["layers.0.experts.1.gate_proj.weight"], tensors["layers.1.experts.2.up_proj.weight"]
    tensors["layers.1.experts.3.up_proj.weight"] = np.ones((D_FF, D_MODEL), np.float32)
    tensors["layers.1.experts.0.up_proj.weight"] = np.ones((D_MODEL, D_FF), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not hold the model") as caught:
        load_weights(jax.eval_shape(toy), EACH, tmp_path)
    assert str(caught.value).splitlines()[1:] == [
        "  missing: layers.0.experts.1.gate_proj.weight (5, 4)",
        "  missing: layers.1.experts.2.up_proj.weight (5, 4)",
        "  left over: layers.1.experts.3.up_proj.weight",
        "  shape: layers.1.experts.0.up_proj.weight is (4, 5), expected (5, 4)",
    ]


def test_an_expert_may_be_a_part_and_transposed(tmp_path):
    key = "layers.{i}.experts.{e}.gate_up"
    names = {"moe.gate_proj.weight": expert(part(0, transposed(key))), "moe.up_proj.weight": transposed(part(1, expert(key)))}
    model = toy()
    tensors = there_and_back(model, names, tmp_path)
    moe = model.blocks[1].moe
    both = np.concatenate([moe.gate_proj.weight[2], moe.up_proj.weight[2]])  # (2 · d_ff, d_model)
    np.testing.assert_array_equal(tensors["layers.1.experts.2.gate_up"], both.T)


# As gpt-oss has them: all experts in one tensor, (in, out), the rows of gate and up taking turns.
STACKED = {
    "moe.gate_proj.weight": part(0, transposed("layers.{i}.gate_up"), rows=1),
    "moe.up_proj.weight": part(1, transposed("layers.{i}.gate_up"), rows=1),
    "moe.gate_proj.bias": part(0, "layers.{i}.gate_up_bias", rows=1),
    "moe.up_proj.bias": part(1, "layers.{i}.gate_up_bias", rows=1),
}


def test_experts_may_be_stacked_and_pieces_take_turns(tmp_path):
    model = toy(bias=True)
    tensors = there_and_back(model, STACKED, tmp_path)
    moe = model.blocks[0].moe
    assert tensors["layers.0.gate_up"].shape == (EXPERTS, D_MODEL, 2 * D_FF)
    np.testing.assert_array_equal(tensors["layers.0.gate_up"][..., ::2], moe.gate_proj.weight.swapaxes(1, 2))
    np.testing.assert_array_equal(tensors["layers.0.gate_up"][..., 1::2], moe.up_proj.weight.swapaxes(1, 2))
    np.testing.assert_array_equal(tensors["layers.0.gate_up_bias"][:, 1::2], moe.up_proj.bias)


def test_turns_may_be_of_several_rows(tmp_path):
    """As GPT-NeoX has them: each head's query beside its key, under the names of queries and keys of 2 heads, 3 wide."""
    model = Toy((Block(MoE(*(Leaf(jnp.arange(24.0).reshape(6, 4) + 100 * i) for i in range(2)))),))
    names = {f"moe.{name}.weight": part(i, "layers.{i}.qk", rows=3) for i, name in enumerate(("gate_proj", "up_proj"))}
    fused = there_and_back(model, names, tmp_path)["layers.0.qk"]
    np.testing.assert_array_equal(fused[:, 0], [0, 4, 8, 100, 104, 108, 12, 16, 20, 112, 116, 120])


def unpack(halves: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """A toy's packing: whole numbers of a quarter each, one scale a row."""
    return halves.astype(np.float32) / 4 * scales[..., None].astype(np.float32)


PACKED = {
    "moe.gate_proj.weight": packed(part(0, "layers.{i}.gate_up"), ("_numbers", "_scales"), unpack),
    "moe.up_proj.weight": packed(part(1, "layers.{i}.gate_up"), ("_numbers", "_scales"), unpack),
}


def packed_folder(folder, **changes) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 16, (EXPERTS, 2 * D_FF, D_MODEL)).astype(np.uint8)
    scales = (2.0 ** rng.integers(-3, 3, (EXPERTS, 2 * D_FF))).astype(np.float16)
    tensors = {f"layers.{i}.gate_up{suffix}": array for i in range(2) for suffix, array in (("_numbers", numbers), ("_scales", scales))}
    tensors |= changes
    save_file({key: array for key, array in tensors.items() if array is not None}, folder / "model.safetensors")
    return numbers, scales


def test_a_packed_tensor_is_read_and_saved_as_the_tensor_itself(tmp_path):
    numbers, scales = packed_folder(tmp_path)
    model = load_weights(jax.eval_shape(toy), PACKED, tmp_path)
    np.testing.assert_array_equal(model.blocks[1].moe.up_proj.weight, unpack(numbers, scales)[:, D_FF:])
    assert sorted(there_and_back(model, PACKED, tmp_path / "again")) == ["layers.0.gate_up", "layers.1.gate_up"]


def test_half_of_a_packed_tensor_is_missing_by_name(tmp_path):
    packed_folder(tmp_path, **{"layers.1.gate_up_scales": None})
    with pytest.raises(ValueError, match=r"missing: layers\.1\.gate_up_scales$") as caught:
        load_weights(jax.eval_shape(toy), PACKED, tmp_path)
    assert len(str(caught.value).splitlines()) == 2


def test_a_packed_tensor_of_another_shape_is_named(tmp_path):
    packed_folder(
        tmp_path, **{"layers.1.gate_up_numbers": np.ones((3, 7, 4), np.uint8), "layers.1.gate_up_scales": np.ones((3, 7), np.float16)}
    )
    with pytest.raises(
        ValueError, match=r"gate_up_numbers, layers.1.gate_up_scales make a tensor of shape \(3, 7, 4\), expected \(3, 10, 4\)"
    ):
        load_weights(jax.eval_shape(toy), PACKED, tmp_path)


def test_a_row_for_experts_needs_their_number():
    with pytest.raises(ValueError, match=r"expected a key with \{e\}"):
        expert("layers.{i}.gate.weight")


def test_rows_of_a_table_compose():
    assert part(2, transposed("a.{i}")) == transposed(part(2, "a.{i}")) == Stored("a.{i}", transposed=True, part=2)
