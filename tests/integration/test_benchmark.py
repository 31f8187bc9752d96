"""The benchmark runs, and what it looks into."""

import json

import pytest
from integration.recipe_runs import run

from recipes.benchmark import LADDER, SIZES, flat, ours
from recipes.benchmark_ours import products_outside
from train.runtime import device_facts


def small(**changes):
    return {"kind": "train", "size": SIZES["T"], "backend": "cpu", "dtype": "bfloat16", "steps": 2} | changes


@pytest.fixture
def worker(monkeypatch, tmp_path):
    """A process of the benchmark, as the benchmark starts it, but with caches of its own."""
    monkeypatch.setenv("ZMAJ_CACHE_DIR", str(tmp_path))
    for name in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    started = []

    def start(**changes):
        started.append(ours(small(**changes)))
        return started[-1]

    yield start
    for each in started:
        each.close()


def test_a_product_outside_the_fast_library_is_found():
    program = """
%inner (a: f32[2,3]) -> f32[2,4] {
  ROOT %d = f32[2,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}
}
%slow (a: f32[2,3]) -> f32[7,4] {
  ROOT %d = f32[7,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}
}
ENTRY %main (a: f32[2,3]) -> f32[2,4] {
  %x = f32[2,4]{1,0} fusion(%a), kind=kCustom, calls=%inner, backend_config={"fusion_config":{"kind":"__ynn_fusion"}}
  %y = f32[7,4]{1,0} fusion(%a), kind=kLoop, calls=%slow
  ROOT %z = f32[5]{0} dot(%x, %y), lhs_contracting_dims={1}
}"""
    assert products_outside(program) == (3, ["f32[7,4]", "f32[5]"])


@pytest.mark.skipif("avx512_bf16" not in device_facts()["cpu_flags"], reason="the fast path is for processors with bf16 products")
def test_the_compiled_step_leaves_no_matrix_product_outside_the_fast_path(worker):
    fast, plain = worker().facts, worker(backend="reference").facts
    assert fast["products"] > 30
    assert fast["products_outside"] == []
    assert len(plain["products_outside"]) > 5  # else the question would be idle
    assert plain["loss"] == pytest.approx(fast["loss"], rel=1e-3)


def test_a_run_writes_figures_under_stable_names(tmp_path):
    arguments = [
        "--parts",
        "train",
        "--sizes",
        "T",
        "--rounds",
        "1",
        "--steps",
        "2",
        "--run-dir",
        tmp_path / "run",
        "--json",
        tmp_path / "out.json",
    ]
    status, output = run(arguments, tmp_path / "cache", recipe="benchmark")
    assert status == 0, output
    figures = json.loads((tmp_path / "out.json").read_text())
    names = ("tokens_per_s", "step_s", "best_gflops", "first_s", "first_s_cached", "argument_bytes", "temp_bytes", "peak_rss_bytes")
    assert all(figures[f"train.T.{name}"] > 0 for name in names)
    assert figures["train.T.tokens_per_s"] == pytest.approx(4 * 64 / figures["train.T.step_s"])
    parameters = figures["train.T.n_params"]
    assert figures["train.T.argument_bytes"] >= 3 * 4 * parameters  # fp32 weights and two moments
    status, output = run(arguments, tmp_path / "cache", recipe="benchmark")
    assert status == 0, output
    assert "train: already measured" in output


def test_wrong_sizes_and_dead_processes_are_told_in_words(tmp_path):
    status, output = run(["--sizes", "XXL", "--run-dir", tmp_path / "run"], tmp_path / "cache", recipe="benchmark")
    assert status == 2
    assert "--sizes must be some of T, S, M" in output
    with pytest.raises(RuntimeError, match=r"a process of the benchmark ended: .*(\n.*)*NoSuchBackend"):
        ours(small(backend="NoSuchBackend"))


def test_every_rung_of_the_ladder_names_something_there_is():
    from recipes.benchmark_ours import PIECES

    for without in LADDER.values():
        assert set(without.get("without", [])) <= {*PIECES, "loss", "donation"}
    assert flat({"a": {"b": {"c": 1}}, "d": 2}) == {"a.b.c": 1, "d": 2}
