"""What the command line makes of flags, presets, saved configs and mistakes."""

import json

import pytest

from recipes.command_line import parse
from recipes.pretrain_small import PRESETS, Config, main
from recipes.running import save_config


def config_of(*argv) -> Config:
    return parse(Config, "", recipe="pretrain_small", presets=PRESETS, default_preset="4m", argv=list(map(str, argv)))


def test_flags_win_over_presets_and_presets_over_defaults():
    assert config_of().d_model == Config().d_model
    assert config_of("--preset", "14m").d_model == PRESETS["14m"]["d_model"]
    chosen = config_of("--preset", "14m", "--d-model", "192", "--optimizer.name", "adamw", "--no-resume")
    assert (chosen.d_model, chosen.n_layers, chosen.optimizer.name) == (192, PRESETS["14m"]["n_layers"], "adamw")


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_about_the_parameters_they_are_named_after(preset):
    import equinox as eqx
    import jax

    import lm
    from lm.hf import abstract

    config = config_of("--preset", preset)
    skeleton = abstract(lm.ARCHITECTURES["qwen3"].model.init, config.model_config_of(config.vocab))
    millions = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(skeleton, lambda leaf: hasattr(leaf, "shape")))) / 1e6
    assert millions == pytest.approx(float(preset.removesuffix("m")), rel=0.1)


def test_a_saved_config_comes_back_and_only_resumable_fields_may_change(tmp_path, capsys):
    started = config_of("--preset", "1m", "--seed", 3, "--steps", 7)
    save_config(started, tmp_path)
    again = config_of("--resume", "--run-dir", tmp_path)
    assert again.model_copy(update={"resume": False, "run_dir": None}) == started
    assert config_of("--resume", "--run-dir", tmp_path, "--steps", 9, "--remat", "full").steps == 9
    with pytest.raises(SystemExit) as left:
        config_of("--resume", "--run-dir", tmp_path, "--seed", 4, "--schedule.peak", 0.1)
    assert left.value.code == 2
    words = capsys.readouterr().err
    assert "--seed: the run has 3, asked for is 4" in words
    assert "--schedule.peak: the run has 0.0082, asked for is 0.1" in words
    assert "--steps" in words.split("May differ:")[1]


def test_a_saved_config_is_the_start_of_a_new_run(tmp_path):
    started = config_of("--preset", "1m", "--seed", 3, "--optimizer.frozen", "embed.weight", "--optimizer.learning-rate-of", "mlp.*", 0.5)
    save_config(started, tmp_path)
    assert config_of("--config", tmp_path / "config.json") == started
    changed = config_of("--config", tmp_path / "config.json", "--seed", 4)  # anything may differ: it is another run
    assert changed == started.model_copy(update={"seed": 4})


def test_resume_without_a_folder_takes_the_latest_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, seed in (("pretrain_small-20260101-000000", 1), ("pretrain_small-20260202-000000", 2), ("other-20270101-000000", 3)):
        save_config(config_of("--seed", seed), tmp_path / "runs" / name)
    assert config_of("--resume").seed == 2


def test_a_saved_config_with_a_field_we_do_not_know_is_refused(tmp_path, capsys):
    save_config(config_of(), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"warp": 9}))
    with pytest.raises(SystemExit):
        config_of("--resume", "--run-dir", tmp_path)
    assert f"{path} is not a config of this recipe as it is now:\n--warp: Extra inputs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--n-kv-heads", "3"], r"n_heads \(4\) must be a multiple of n_kv_heads \(3\)"),
        (["--d-model", "30"], r"d_model \(30\) must be a multiple of n_heads \(4\)"),
        (["--batch", "6", "--step.micro-batches", "4"], "multiple of step.micro_batches"),
        (["--vocab", "200"], "vocab"),
        (["--optimzer.name", "adamw"], "optimzer"),
        (["--preset", "5m"], "5m"),
        (["--steps", "0"], "greater than or equal to 1"),
        (["--steps", "many"], "many"),
        (["--backend", "triton"], "reference, xla, cudnn, cpu"),
        (["--resume", "--run-dir", "no/such/run"], "no/such/run"),
        (["--schedule.peak"], "peak"),
        (["--optimizer.beta1", "2"], r"optimizer: beta1: Input should be less than 1 \(got 2.0\)"),
        (["--optimizer.learning-rate-of", "norm.*", "-2"], r"learning_rate_of must be 0 or more for each role, got \{'norm\.\*': -2.0\}"),
        (["--optimizer.name", "schedule_free"], "add --schedule.shape constant"),
        (["--config", "no/such/file.json"], "no/such/file.json does not exist: expected a config.json that a run has written"),
        (["--config", __file__], "is not JSON"),
        (["--config", "a.json", "--preset", "1m"], "leave out --preset 1m"),
        (["--config", "a.json", "--resume"], "leave out --config a.json"),
    ],
    ids=" ".join,
)
def test_impossible_settings_are_refused_in_words(arguments, words, capsys):
    import re

    with pytest.raises(SystemExit) as left:
        config_of(*arguments)
    assert left.value.code == 2
    printed = re.sub(r"[\s│]+", " ", "".join(capsys.readouterr()))  # frames and line breaks
    assert re.search(words, printed), printed
    assert "errors.pydantic.dev" not in printed


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"caf\xe9\n" * 500, "offset 3"),
        (b"one short line after another\n" * 12, "batch"),
    ],
    ids=["empty file", "invalid UTF-8", "smaller than one batch"],
)
def test_unusable_text_stops_before_training(content, words, tmp_path, monkeypatch):
    monkeypatch.setenv("ZMAJ_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_bytes(content)
    config = config_of("--preset", "1m", "--vocab", 270, "--data", tmp_path / "text.txt", "--run-dir", tmp_path / "run")
    with pytest.raises(ValueError, match=words):
        main(config)


def test_a_run_folder_is_never_overwritten_and_no_other_folder_filled(tmp_path):
    save_config(config_of(), tmp_path / "run")
    with pytest.raises(ValueError, match="already holds a run: add --resume"):
        main(config_of("--run-dir", tmp_path / "run"))
    with pytest.raises(ValueError, match="is no run, and not empty"):
        main(config_of("--run-dir", tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; a run needs a folder"):
        main(config_of("--run-dir", tmp_path / "file"))


def test_a_start_that_failed_does_not_use_up_its_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ZMAJ_CACHE_DIR", str(tmp_path / "cache"))
    config = config_of("--data", tmp_path / "missing.txt", "--run-dir", tmp_path / "run")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"missing\.txt"):
            main(config)
    assert not (tmp_path / "run" / "config.json").exists()


def test_kernels_of_another_device_are_refused_at_the_door(tmp_path):
    with pytest.raises(ValueError, match="backend 'cudnn' cannot be used here: it is the flash kernel of NVIDIA cards"):
        main(config_of("--backend", "cudnn", "--run-dir", tmp_path / "run"))
