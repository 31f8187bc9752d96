"""The rule that chooses kernels, row by row."""

import pytest
from tiny import tiny

from train.backends import attention_of, choose_backend, choose_dtype, choose_weights

CPU = {"platform": "cpu", "device_kind": "cpu", "cpu_flags": ["avx2", "avx512_bf16"], "cpu_vendor": "AuthenticAMD"}
XEON = CPU | {"cpu_vendor": "GenuineIntel"}
XEON_AMX = XEON | {"cpu_flags": [*CPU["cpu_flags"], "amx_bf16"]}
OLD_CPU = CPU | {"cpu_flags": ["avx2"]}
H100 = {"platform": "gpu", "device_kind": "NVIDIA H100 80GB HBM3", "compute_capability": "9.0"}
T4 = {"platform": "gpu", "device_kind": "Tesla T4", "compute_capability": "7.5"}
MI300 = {"platform": "gpu", "device_kind": "AMD Instinct MI300X", "compute_capability": "gfx942"}
TPU = {"platform": "tpu", "device_kind": "TPU v5e"}
MODEL = {"dtype": "bfloat16", "head_dim": 64, "seq": 512}


@pytest.mark.parametrize(
    ("device", "changes", "name"),
    [
        (CPU, {}, "cpu"),
        (CPU, {"dtype": "float32"}, "cpu"),
        (CPU, {"softcap": 50.0}, "cpu"),
        (CPU, {"sinks": True}, "cpu"),
        (CPU, {"dropout": 0.1}, "reference"),
        (OLD_CPU, {"dtype": "float32"}, "cpu"),
        (OLD_CPU, {"dtype": "float32", "dropout": 0.1}, "reference"),
        (XEON, {"dtype": "float32"}, "cpu"),
        (H100, {}, "xla"),  # cudnn could, but is taken by name only
        (H100, {"dtype": "float16", "head_dim": 128}, "xla"),  # cudnn could, but is taken by name only
        (H100, {"dtype": "float32"}, "xla"),
        (H100, {"head_dim": 256}, "xla"),
        (H100, {"head_dim": 60}, "xla"),
        (H100, {"seq": 511}, "xla"),
        (H100, {"softcap": 50.0}, "reference"),
        (H100, {"sinks": True}, "reference"),
        (H100, {"dropout": 0.1}, "reference"),
        (T4, {}, "xla"),
        (MI300, {}, "xla"),
        (TPU, {}, "xla"),
    ],
)
def test_auto_takes_the_first_that_can(device, changes, name):
    assert choose_backend(device, **(MODEL | changes)) == name


def test_the_dtype_is_bf16_where_the_device_multiplies_it():
    expected = {"bfloat16": (CPU, XEON_AMX, H100, TPU), "float32": (OLD_CPU, XEON)}
    assert all(choose_dtype(device) == dtype for dtype, devices in expected.items() for device in devices)


def test_weights_that_are_only_read_are_bf16_wherever_there_are_instructions_for_it():
    assert [choose_weights(device) for device in (CPU, XEON, OLD_CPU, H100)] == ["bfloat16", "bfloat16", "float32", "bfloat16"]


@pytest.mark.parametrize(
    ("device", "changes", "asked", "words"),
    [
        (CPU, {}, "cudnn", "flash kernel of NVIDIA cards, this is cpu. These can: cpu, xla, reference"),
        (H100, {"dtype": "float32"}, "cudnn", "bfloat16 or float16 only, asked for is float32. These can: xla, reference"),
        (H100, {"head_dim": 160}, "cudnn", "multiple of 8 up to 128, it is 160"),
        (T4, {}, "cudnn", "compute capability 8.0, this card has 7.5"),
        (H100, {}, "cpu", "written for CPUs, this is NVIDIA H100"),
        (CPU, {"softcap": 50.0}, "xla", "cannot soft-cap scores .attention_softcap = 50.0.. These can: cpu, reference"),
        (H100, {"sinks": True}, "xla", "it has no attention sinks. These can: reference"),
        (CPU, {"dropout": 0.1}, "cpu", "cannot drop attention probabilities .attention_dropout = 0.1.. These can: reference"),
        (CPU, {}, "triton", "backend must be auto or one of reference, xla, cudnn, cpu"),
    ],
)
def test_a_name_that_cannot_is_an_error_with_reason_and_remedy(device, changes, asked, words):
    with pytest.raises(ValueError, match=words):
        choose_backend(device, **(MODEL | changes), asked=asked)


@pytest.mark.parametrize("asked", ["reference", "xla", "cpu"])
def test_a_name_that_can_is_taken_as_it_is(asked):
    assert choose_backend(OLD_CPU, **MODEL, asked=asked) == asked


@pytest.mark.parametrize(
    ("family", "softcap", "sinks"), [("llama", None, False), ("gemma2", 50.0, False), ("gpt_oss", None, True), ("mixtral", None, False)]
)
def test_what_is_asked_of_a_model_is_what_its_layers_do(family, softcap, sinks):
    model = tiny(family)
    layer = model.blocks[0].attn
    assert attention_of(model) == {"head_dim": layer.head_dim, "softcap": layer.softcap, "sinks": layer.sinks is not None}
    assert (layer.softcap, layer.sinks is not None) == (softcap, sinks)
