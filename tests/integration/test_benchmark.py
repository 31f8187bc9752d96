"""The benchmark runs, and what it looks into."""

import json

import pytest
from integration.recipe_runs import corpus, run, run_here
from quick_xla import FLAGS

from recipes.benchmark import LADDER, PARTS, flat, measure_train
from recipes.benchmark_config import SIZES, Config, Figures, check
from recipes.benchmark_growth import grown
from recipes.benchmark_memory import cases, expected_bytes
from recipes.benchmark_ours import forget_peak, peak_resident_bytes, products_outside, resident_bytes
from recipes.benchmark_workers import ours
from train.runtime import device_facts

# A process that has prepared itself starts its workers without the user's XLA flags.
QUICKLY = {"ZMAJ_NO_PREPARE": "1", "XLA_FLAGS": " ".join(FLAGS)}


def small(**changes):
    return {"kind": "train", "size": SIZES["T"], "backend": "cpu", "dtype": "bfloat16", "steps": 2} | changes


@pytest.fixture
def worker(monkeypatch, tmp_path):
    """A process of the benchmark, as the benchmark starts it, but with caches of its own; compiled as for users, or quickly."""
    monkeypatch.setenv("ZMAJ_CACHE_DIR", str(tmp_path))
    for name in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    started = []

    def start(quickly=False, **changes):
        started.append(ours(small(**changes), QUICKLY if quickly else None))
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


@pytest.mark.skipif("avx2" not in device_facts()["cpu_flags"], reason="XLA's fast library was looked into on x86 with AVX2 alone")
def test_the_compiled_step_leaves_no_matrix_product_outside_the_fast_path(worker):
    fast, plain = worker().facts, worker(backend="reference", quickly=True).facts
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
    status, output = run(arguments, tmp_path / "cache", recipe="benchmark", **QUICKLY)
    assert status == 0, output
    figures = json.loads((tmp_path / "out.json").read_text())
    names = ("tokens_per_s", "step_s", "best_gflops", "first_s", "first_s_cached", "argument_bytes", "temp_bytes", "peak_rss_bytes")
    assert all(figures[f"train.T.{name}"] > 0 for name in names)
    assert figures["train.T.tokens_per_s"] == pytest.approx(4 * 64 / figures["train.T.step_s"])
    parameters = figures["train.T.n_params"]
    assert figures["train.T.argument_bytes"] >= 3 * 4 * parameters  # fp32 weights and two moments
    status, output = run_here(arguments, "benchmark")
    assert status == 0, output
    assert "train: already measured" in output


@pytest.mark.heavy
def test_all_that_surrounds_the_step_is_measured_too(tmp_path):
    parts = ["pipeline", "checkpoint", "trace", "imports", "growth", "memory"]
    arguments = ["--parts", *parts, "--sizes", "T", "--rounds", "1", "--steps", "1", "--data", corpus(tmp_path / "texts")]
    arguments += ["--widths", "96", "--depths", "--seqs", "--batches", "--layers", "scan", "--remats", "full", "--micro-batches", "2", "3"]
    arguments += ["--run-dir", tmp_path / "run", "--json", tmp_path / "out.json"]
    status, output = run(arguments, tmp_path / "cache", recipe="benchmark")
    assert status == 0, output
    figures = json.loads((tmp_path / "out.json").read_text())
    positive = {
        "pipeline": ("tokens_per_s", "share_of_step", "wait_s", "fed_ratio", "encode_tokens_per_s"),
        "checkpoint": ("blocking_s", "total_s", "bytes"),
        "trace": ("seconds", "without_checks_seconds", "again_seconds", "again_without_checks_seconds", "step_ratio"),
        "imports": ("python_s", "jax_s", "lm_s", "lm_without_checks_s", "train_s", "help_s"),
        "growth": ("width.64.tokens_per_s", "width.96.tokens_per_s", "width.96.flops_ratio", "seq.64.gflops", "batch.4.temp_bytes"),
        "memory": ("T.none.1.step_s", "T.scan-full.2.step_ratio", "T.scan-full.2.temp_ratio", "T.scan-full.2.step_rss_bytes"),
    }
    assert not [f"{part}.{name}" for part in parts for name in positive[part] if not figures[f"{part}.{name}"] > 0]
    assert {*parts} == {name.removeprefix("part_s.") for name in figures if name.startswith("part_s.")}

    assert figures["checkpoint.total_s"] >= figures["checkpoint.blocking_s"]
    assert figures["checkpoint.state_bytes"] > 12 * figures["growth.width.64.n_params"]  # weights and two moments in fp32
    assert figures["imports.jax_s"] > figures["imports.python_s"]
    assert figures["growth.width.96.flops_per_token"] > figures["growth.width.64.flops_per_token"]
    expected, counted = figures["memory.T.none.1.expected_argument_bytes"], figures["memory.T.none.1.argument_bytes"]
    assert counted == pytest.approx(expected, abs=4096)  # of statistics, and places of small arrays
    assert "3 micro-batches do not divide a batch of 4 rows; left out" in output
    assert all((tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG") for name in ("growth.png", "memory.png"))
    assert not list((tmp_path / "run").glob("tmp*"))  # the checkpoints are gone


def test_a_size_grows_along_one_axis_and_takes_along_what_belongs_to_it():
    small = SIZES["S"]
    assert grown(small, "width", 512) == small | {"d_model": 512, "n_heads": 8, "d_ff": 1344}
    assert grown(small, "depth", 9) == small | {"n_layers": 9}
    assert grown(small, "seq", 1024) == SIZES["S-1k"]
    assert grown(small, "seq", 8192) == SIZES["S-8k"]  # one row, more tokens than before
    assert grown(small, "batch", 3) == small | {"batch": 3}


def test_the_memory_formula_counts_what_a_small_step_keeps():
    size = {"vocab": 50, "d_model": 6, "n_layers": 2, "n_heads": 3, "d_ff": 10, "seq": 7, "batch": 4}
    n_params, tokens = 50 * 6 + 2 * (4 * 36 + 3 * 60 + 12) + 6, 28
    none = expected_bytes(size, "none", 1)
    assert (none["parameters"], none["moments"], none["batch"]) == (4 * n_params, 8 * n_params, 20 * tokens)
    assert none["bf16 weights"] == 2 * 2 * (4 * 36 + 3 * 60)
    assert none["activations"] == 2 * tokens * (24 * 6 + 10 * 10 + 4 * 3)
    deep = size | {"n_layers": 20, "batch": 40}
    kept = {remat: expected_bytes(deep, remat, 1) for remat in ("none", "dots", "full")}
    assert sum(kept["none"].values()) > sum(kept["dots"].values()) > sum(kept["full"].values())
    assert kept["full"]["activations"] == 20 * 280 * 4 * 6
    cut = expected_bytes(deep, "none", 4)
    assert (cut["activations"], cut["gradients"]) == (kept["none"]["activations"] / 4, cut["parameters"])


def test_memory_has_a_case_for_every_pair_and_the_plain_step_once():
    found = cases(Config(), SIZES["S"])
    names = [(name, pieces) for name, _, pieces, _, _ in found if name != "compact"]
    assert len({*names, ("none", 1)}) == len(names) + 1 == 2 * 3 * 3
    one_row = cases(Config(micro_batches=(1, 2), layers=("loop",)), SIZES["S-8k"])
    assert [(name, pieces) for name, _, pieces, _, _ in one_row if name != "compact"] == [("dots", 1), ("full", 1)]


@pytest.mark.skipif(not resident_bytes(), reason="this system does not tell")
def test_the_peak_of_memory_is_forgotten_when_told_so():
    held = bytearray(200 << 20)
    high = peak_resident_bytes()
    assert high >= resident_bytes() > len(held)
    del held
    forget_peak()
    assert peak_resident_bytes() < high - (150 << 20)


def test_wrong_sizes_and_dead_processes_are_told_in_words(tmp_path):
    status, output = run_here(["--sizes", "XXL", "--run-dir", tmp_path / "run"], "benchmark")
    assert status == 2
    assert "--sizes must be some of T, S, M" in output
    with pytest.raises(ValueError, match=r"--widths must be multiples of the width of a head of S \(64\), got 100"):
        check(Config(widths=(128, 100)))
    with pytest.raises(ValueError, match="--micro-batches must be 1 or more each, got 0"):
        check(Config(micro_batches=(1, 0)))
    with pytest.raises(RuntimeError, match=r"a process of the benchmark ended: .*(\n.*)*NoSuchBackend"):
        ours(small(backend="NoSuchBackend"))


def test_a_case_that_was_kept_is_not_measured_again(tmp_path):
    figures = Figures(tmp_path / "figures.json")
    figures["train.T"] = {"n_params": 1}  # as no measurement would find it
    figures.keep()
    again = Figures(tmp_path / "figures.json")
    measure_train(Config(sizes=("T",)), again)
    assert again == {"train.T": {"n_params": 1}}


def test_every_part_can_be_asked_for():
    assert Config().parts == tuple(PARTS)


def test_every_rung_of_the_ladder_names_something_there_is():
    from recipes.benchmark_ours import PIECES

    for without in LADDER.values():
        assert set(without.get("without", [])) <= {*PIECES, "loss", "donation"}
    assert flat({"a": {"b": {"c": 1}}, "d": 2}) == {"a.b.c": 1, "d": 2}
