"""What size brings, foretold and then checked; and how learning rate, batch, weight decay and tokens go along with the size.

Series of short runs (`recipes.trial`), each run a line of `--file`, and what is there not run again:

- `--part sizes`: models of several sizes, each on `--tokens-per-parameter` times its parameters, at the learning rate of its width. A law
  is fitted to all but the largest (`train.laws`: the one that foretells the next best), what the largest will come to is written down with
  its 95 % interval *before* it is run, and then it is run.
- `--part widths`: one depth, several widths, a grid of learning rates, under each rule of `train.transfer`. Where a rule transfers, the
  best rate is the same at every width; from the `constant` rule's best rates follows the exponent that would.
- `--part batches`, `--part decays`: the same grid with rows a step, or weight decay, in the place of the learning rate, which is
  `--rate`, and goes with the root of the batch (Malladi et al. 2022, arXiv:2205.10287).
- `--part tokens`: the sizes of the ladder at equal computation, 6 x parameters x tokens, for several budgets. From the best size of each
  budget follows how parameters and tokens should grow (Hoffmann et al. 2022, arXiv:2203.15556, approach 2).

    python -m recipes.scaling --part sizes
    python -m recipes.scaling --part widths --rules constant mup --optimizer muon
    python -m recipes.scaling --part batches --rules power
    python -m recipes.scaling --table-only
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from loguru import logger
from pydantic import Field, field_validator
from rich.console import Console

import lm
from recipes import scaling_table, speedrun
from recipes.ablate import nested
from recipes.command_line import RecipeConfig, fail
from recipes.running import ENDS_IN_WORDS
from recipes.trial import Material, append_line, changed, machine, material, read_lines, run_trial, settings_digest
from train.laws import chosen, exponent, foretold, valley
from train.logs import plain_messages, progress
from train.optimizers import ScheduleConfig
from train.runtime import choose_device, compilation_cache
from train.transfer import PEAK, RuleName, changes, peak_at, transferred

HEAD = 32  # width of a head at every size
PartName = Literal["sizes", "widths", "batches", "decays", "tokens"]
VARIED = {"widths": "rate", "batches": "batch", "decays": "decay"}  # by the part: what a grid over widths varies


class Config(RecipeConfig):
    """Which runs."""

    part: PartName = Field("sizes", description="the ladder of sizes; widths with a grid of something; sizes at equal computation")
    sizes: tuple[str, ...] = Field(
        ("64x2", "96x3", "128x4", "192x4", "256x4"), min_length=3, description="width x layers of each size, the largest last"
    )
    tokens_per_parameter: float = Field(
        1.0, gt=0, description="tokens that a size is trained on, over its parameters; 20 in arXiv:2203.15556"
    )
    widths: tuple[int, ...] = Field((32, 64, 128, 256), min_length=2, description="widths; the first is the base of the rules")
    rates: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2), min_length=3, description="peak learning rates at the base, each tried at every width"
    )
    rate: float = Field(1.72e-2, gt=0, description="batches, decays: peak learning rate at the base's width and --batch")
    batches: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        (2, 4, 8, 16, 32), min_length=3, description="rows a step, each tried at every width"
    )
    decays: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.025, 0.05, 0.1, 0.2, 0.4), min_length=3, description="weight decays, each tried at every width"
    )
    budgets: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (2e12, 6e12, 1.8e13), min_length=2, description="tokens: 6 x parameters x tokens of a run"
    )
    rules: tuple[RuleName, ...] = Field(("constant", "mup"), min_length=1, description="rules of train.transfer")
    exponent: float | None = Field(None, description="of the learning rate in mup and power; None: the theory's, and the measured one")
    layers: int = Field(4, ge=1, description="widths: layers of every model")
    tokens: int = Field(300_000, gt=0, description="widths: tokens of every run")
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="of weights, data order and dropout")
    optimizer: Literal["muon", "normuon", "adamw"] = Field("muon", description="rule of the updates")
    base: dict[str, str] = Field({}, description="other values of all runs, by dotted name: schedule.shape cosine zero_init true")
    vocab: int = Field(2048, ge=300, description="tokens of the vocabulary")
    seq: int = Field(256, gt=1, description="tokens of a row")
    batch: int = Field(8, gt=0, description="rows a step")
    data: str = Field("stdlib", description="the corpus, in the words of pretrain_small's --data")
    file: Path = Field(Path("docs/scaling.jsonl"), description="where the lines go")
    page: Path | None = Field(Path("docs/ablations.md"), description="where the tables go, between their marks; None: only the screen")
    picture: Path | None = Field(None, description="where the picture goes; None: docs/images/scaling_PART.png where there is a page")
    table_only: bool = Field(False, description="run nothing")
    device: Literal["auto", "cpu", "gpu", "tpu"] = Field("auto", description="where to compute")

    @field_validator("sizes")
    @classmethod
    def _are_sizes(cls, sizes: tuple[str, ...]) -> tuple[str, ...]:
        for size in sizes:
            width, _, layers = size.partition("x")
            if not (width.isdigit() and layers.isdigit() and int(width) > 0 and int(width) % HEAD == 0 and int(layers) > 0):
                raise ValueError(f"a size is WIDTHxLAYERS, as in 128x4, its width a multiple of {HEAD}; got {size!r}")
        return sizes

    @field_validator("widths")
    @classmethod
    def _are_widths(cls, widths: tuple[int, ...]) -> tuple[int, ...]:
        if odd := [width for width in widths if width <= 0 or width % HEAD]:
            raise ValueError(f"widths must be multiples of {HEAD}, the width of a head; got {odd[0]}")
        return widths


# ------------------------------------------------------------------------------------------- main


def main(config: Config) -> dict[str, Any]:
    """Run what is missing, fit, check, tell. What was found is returned."""
    plain_messages()
    device = choose_device(config.device)
    compilation_cache()
    plain = experiment(config, config.widths[0], 1)
    facts = machine(plain, device)
    text = material(plain)
    if config.part == "sizes":
        found, (words, draw) = sizes(config, text, facts), (scaling_table.words_of_sizes, scaling_table.draw_sizes)
    elif config.part == "tokens":
        found, (words, draw) = tokens(config, text, facts), (scaling_table.words_of_tokens, scaling_table.draw_tokens)
    else:
        found, (words, draw) = grid(config, text, facts), (scaling_table.words_of_grid, scaling_table.draw_grid)
    said = words(found)
    Console().print(said, markup=False, highlight=False, soft_wrap=True)
    picture = config.picture
    if picture is None and config.page is not None:
        picture = config.page.parent / "images" / f"scaling_{config.part}.png"
    if picture is not None:
        draw(found, picture)
    if config.page is not None:
        scaling_table.put(said, config.part, config.page, picture)
    return found


def experiment(config: Config, width: int, layers: int, peak: float = PEAK.value) -> speedrun.Experiment:
    """A model of this width and depth; steps are not set yet."""
    base = speedrun.Experiment(
        data=config.data,
        vocab=config.vocab,
        d_model=width,
        n_layers=layers,
        n_heads=width // HEAD,
        n_kv_heads=width // HEAD,
        d_ff=16 * round(width * 8 / 3 / 16),  # SwiGLU's two thirds of 4 widths
        seq=config.seq,
        batch=config.batch,
        schedule=ScheduleConfig(peak=peak),
    )
    return changed(changed(base, {"optimizer": {"name": config.optimizer}}), nested(config.base))  # the rest as in pretrain_small


# ------------------------------------------------------------------------------------------- sizes


def sizes(config: Config, text: Material, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The ladder, the law, the prediction and what became of it."""
    ladder = {}
    for size in config.sizes:
        width, layers = map(int, size.split("x"))
        rung = experiment(config, width, layers, peak_at(width))  # as in the presets
        n = parameters(rung, text)
        ladder[size] = rung.model_copy(update={"steps": max(1, round(config.tokens_per_parameter * n / (rung.batch * rung.seq)))})
    counted = {size: parameters(rung, text) for size, rung in ladder.items()}
    order = sorted(ladder, key=lambda size: counted[size])
    *seen, largest = order
    asked = [(("size", size), ladder[size], {"size": size}) for size in seen]
    lines = carried_out(config, asked, text, facts)
    if len({line["parameters"] for line in lines}) < 2:
        raise ValueError(f"{config.file} has runs of fewer than two sizes with these settings: leave out --table-only")
    law, off = chosen([line["parameters"] for line in lines], [line["bits_per_byte"] for line in lines])
    told = foretold(law, [line["parameters"] for line in lines], [line["bits_per_byte"] for line in lines], counted[largest])
    settings = settings_digest(ladder[largest], text)
    prediction = {
        "kind": "prediction",
        "size": largest,
        "parameters": counted[largest],
        "settings": settings,
        "law": law._asdict(),
        **{name: told.record()[name] for name in ("value", "low", "high", "interval")},
        "runs": len(lines),
        "from_settings": sorted({line["settings"] for line in lines}),
    }
    kept = [line for line in read_lines(config.file) if same_prediction(line, prediction)]
    if not kept and not config.table_only:
        append_line(config.file, prediction | {"commit": facts["commit"]})
        logger.info(f"foretold, before it is run: {largest} comes to {told.value:.4f} bits per byte; law {law.words()}")
    last = carried_out(config, [(("size", largest), ladder[largest], {"size": largest})], text, facts)
    return {
        "lines": [*lines, *last],
        "law": law,
        "laws_off_by": off,
        "largest": largest,
        "parameters": counted,
        "foretold": kept[-1] if kept else prediction,
        "came_to": [line["bits_per_byte"] for line in last],
        "corpus": text.source.name,
        "tokens_per_parameter": config.tokens_per_parameter,
    }


def same_prediction(line: Mapping[str, Any], prediction: Mapping[str, Any]) -> bool:
    """Whether a line foretells the same run from the same runs."""
    names = ("kind", "settings", "runs", "from_settings")
    return all(line.get(name) == prediction[name] for name in names)


def parameters(rung: speedrun.Experiment, text: Material) -> int:
    """Of the model, without making it."""
    skeleton: Any = jax.eval_shape(lambda: lm.build(rung.model_config_of(text.tokenizer.vocab_size), key=jax.random.key(0)))
    return int(skeleton.n_params)


# ------------------------------------------------------------------------------------------- tokens


def tokens(config: Config, text: Material, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Every size at every budget, the best size of each budget, and how it grows."""
    asked, counted = [], {}
    for size in config.sizes:
        width, layers = map(int, size.split("x"))
        rung = experiment(config, width, layers)
        counted[size] = parameters(rung, text)
        for budget in config.budgets:
            run = rung.model_copy(update={"steps": max(1, round(budget / (6 * counted[size] * rung.batch * rung.seq)))})
            asked.append((("size", size, f"{budget:.1e}"), run, {"size": size, "budget": budget}))
    lines = carried_out(config, asked, text, facts)
    courses = {budget: _means([line for line in lines if line["budget"] == budget], "parameters") for budget in config.budgets}
    best = {budget: valley(list(each), list(each.values())) for budget, each in courses.items() if len(each) >= 3}
    return {
        "lines": lines,
        "parameters": counted,
        "budgets": [budget for budget in config.budgets if courses[budget]],
        "courses": courses,
        "best": best,
        "exponent": exponent(best) if len(best) > 1 else None,
        "corpus": text.source.name,
    }


# ------------------------------------------------------------------------------------------- widths


def grid(config: Config, text: Material, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Losses over the grid of each rule, the best value of each width, and the exponent that follows."""
    varied = VARIED[config.part]
    values: tuple[float, ...] = {"rate": config.rates, "batch": config.batches, "decay": config.decays}[varied]
    asked = []
    for rule in config.rules:
        for width in config.widths:
            for value in values:
                told = {"rule": rule, "width": width, "value": value}
                asked.append(((varied, rule, width, value), widened(config, rule, width, value), told))
    lines = carried_out(config, asked, text, facts)
    best: dict[str, dict[int, float]] = {}
    for rule in config.rules:
        for width in config.widths:
            course = _means([line for line in lines if (line["rule"], line["width"]) == (rule, width)], "value")
            if len(course) >= 3:
                best.setdefault(rule, {})[width] = valley(list(course), list(course.values()))
    return {
        "lines": lines,
        "varied": varied,
        "rules": [rule for rule in config.rules if any(line["rule"] == rule for line in lines)],
        "widths": list(config.widths),
        "best": best,
        "exponents": {rule: exponent(found) for rule, found in best.items() if len(found) > 1},
        "optimizer": config.optimizer,
        "corpus": text.source.name,
    }


def widened(config: Config, rule: RuleName, width: int, value: float) -> speedrun.Experiment:
    """The base at another width, as the rule says, with this value of what the part varies."""
    plain, varied = experiment(config, width, config.layers), VARIED[config.part]
    found = transferred(rule, config.optimizer, width, config.widths[0], config.exponent)
    decay = value if varied == "decay" else plain.optimizer.weight_decay
    batch = int(value) if varied == "batch" else config.batch
    rate = found.all * (value if varied == "rate" else config.rate * (batch / config.batch) ** 0.5)
    settings: dict[str, Any] = {"optimizer": {"weight_decay": decay}}
    if rule == "mup":
        settings = changes(found, init_std=plain.init_std, weight_decay=decay)
    return changed(plain, {**settings, "schedule": {"peak": rate}, "batch": batch, "steps": max(1, config.tokens // (batch * config.seq))})


def _means(lines: Sequence[Mapping[str, Any]], name: str) -> dict[float, float]:
    """Mean bits per byte over seeds, by the value of `name`."""
    found: dict[float, list[float]] = {}
    for line in lines:
        found.setdefault(line[name], []).append(line["bits_per_byte"])
    return {value: float(np.mean(each)) for value, each in found.items()}


# ------------------------------------------------------------------------------------------- runs

Asked = tuple[tuple[Any, ...], speedrun.Experiment, dict[str, Any]]  # a name, the run, what its line says beside


def carried_out(config: Config, asked: Sequence[Asked], text: Material, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of all runs asked for, for every seed: those of the file, and those run now."""
    digests = [settings_digest(run, text) for _, run, _ in asked]
    kept = {(line["settings"], line["seed"]): line for line in read_lines(config.file) if line.get("kind") == "run"}
    missing = [(i, seed) for seed in config.seeds for i in range(len(asked)) if (digests[i], seed) not in kept]
    if not config.table_only:
        for i, line in run_all(config, missing, asked, text, facts):
            line = {"kind": "run", "settings": digests[i], **line}
            append_line(config.file, line)
            kept[digests[i], line["seed"]] = line
    found = []
    for digest, (_, _, told) in zip(digests, asked, strict=True):
        found += [{**kept[digest, seed], **told} for seed in config.seeds if (digest, seed) in kept]
    return found


def run_all(
    config: Config, missing: Sequence[tuple[int, int]], asked: Sequence[Asked], text: Material, facts: Mapping[str, Any]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each missing run, with words on how far it is. A diverged one has no bits per byte that a line could hold, and gets 99."""
    begin = time.monotonic()
    for n, (i, seed) in enumerate(missing):
        name, run, told = asked[i]
        run = run.model_copy(update={"seed": seed})
        assert run.steps is not None
        with progress(f"{' '.join(map(str, name))}, seed {seed}", run.steps) as bar:
            trial = run_trial(run, text, lambda done, _, bar=bar: bar(done))  # type: ignore[misc]
        line = {**told, "seed": seed, **trial.record(), **facts}
        for figure in ("bits_per_byte", "last_loss"):
            line[figure] = line[figure] if np.isfinite(line[figure]) else 99.0
        left = (time.monotonic() - begin) / (n + 1) * (len(missing) - n - 1)
        logger.info(
            f"run {n + 1} of {len(missing)}: {' '.join(map(str, name))}, seed {seed}: {line['bits_per_byte']:.4f} bits per byte, "
            f"{trial.train_s:.0f} s; {left / 60:.0f} minutes left"
        )
        yield i, line
        jax.clear_caches()


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__, prog="python -m recipes.scaling"))
    except ENDS_IN_WORDS as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("stopped: every run that was finished stands in the file; the same command goes on")
