import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.digests import digest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "int8", "uint16", "int64"])
def test_any_flipped_bit_changes_the_digest(dtype: str) -> None:
    """Each bit of some elements of a leaf with ragged sides, the zeros included, that a product would swallow."""
    sound = np.zeros((3, 5), jnp.dtype(dtype))
    sound[1, 2] = 7
    before = digest({"a": sound})
    width = sound.dtype.itemsize * 8
    for element in (0, 7, 14):
        for bit in range(width):
            raw = bytearray(sound.tobytes())
            raw[element * width // 8 + bit // 8] ^= 1 << bit % 8
            assert digest({"a": np.frombuffer(raw, sound.dtype).reshape(3, 5)}) != before


def test_digest_sees_exchanged_elements_paths_shapes_and_dtypes() -> None:
    a = jnp.arange(15.0).reshape(3, 5)
    others = [
        {"a": a.at[0, 0].set(a[2, 4]).at[2, 4].set(a[0, 0])},
        {"b": a},
        {"a": a.reshape(5, 3)},
        {"a": a.T.reshape(3, 5)},
        {"a": a.view(jnp.int32)},
        {"a": a, "b": a},
    ]
    assert len({digest(tree) for tree in [{"a": a}, *others]}) == 1 + len(others)


def test_digest_of_numpy_equals_that_of_jax() -> None:
    key = jax.random.key(0)
    tree = {
        "w": jax.random.normal(key, (7, 5)),
        "half": jax.random.normal(key, (3, 11), jnp.bfloat16),
        "mask": jnp.array([True, False, True]),
    }
    assert digest(jax.tree.map(np.asarray, tree)) == digest(tree)
