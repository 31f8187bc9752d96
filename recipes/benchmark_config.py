"""What `recipes.benchmark` can measure, and how long: its settings, and the sizes of model it knows."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro
from pydantic import Field

from recipes.command_line import RecipeConfig
from train.logs import model_flops_per_token, write_json

# vocab, width, layers, heads, MLP width, tokens of a row, rows of a batch
SIZES: dict[str, dict[str, int]] = {
    "T": {"vocab": 512, "d_model": 64, "n_layers": 2, "n_heads": 2, "d_ff": 176, "seq": 64, "batch": 4},
    "S": {"vocab": 8192, "d_model": 384, "n_layers": 6, "n_heads": 6, "d_ff": 1024, "seq": 256, "batch": 16},
    "M": {"vocab": 16384, "d_model": 640, "n_layers": 10, "n_heads": 10, "d_ff": 1728, "seq": 512, "batch": 8},
    "S-1k": {"vocab": 8192, "d_model": 384, "n_layers": 6, "n_heads": 6, "d_ff": 1024, "seq": 1024, "batch": 4},
    "S-4k": {"vocab": 8192, "d_model": 384, "n_layers": 6, "n_heads": 6, "d_ff": 1024, "seq": 4096, "batch": 1},
    "S-8k": {"vocab": 8192, "d_model": 384, "n_layers": 6, "n_heads": 6, "d_ff": 1024, "seq": 8192, "batch": 1},
}

DECODING = "smollm2-135m"  # the preset of `lm.models.llama` that generates, with random weights

AXES = ("width", "depth", "seq", "batch")  # that a step grows along

PartName = Literal["train", "ladder", "decode", "pipeline", "checkpoint", "trace", "imports", "growth", "memory"]
LayersName = Literal["loop", "scan"]
RematName = Literal["none", "dots", "full"]

FEW = 3  # rounds, and steps in a round, at most, where many cases are compared


class Config(RecipeConfig):
    """What to measure, and how long."""

    parts: tuple[PartName, ...] = Field(get_args(PartName), description="what to measure; the page above says what each is")
    sizes: tuple[str, ...] = Field(
        ("S", "M"),
        description=f"of the model, for train and memory; the first one serves the other parts. Known: {', '.join(SIZES)}",
    )
    rounds: int = Field(5, ge=1, description=f"turns that each of those compared takes; growth and memory take {FEW} at most")
    steps: int = Field(10, ge=1, description=f"training steps in a turn; growth and memory take {FEW} at most")
    dtype: Literal["float32", "bfloat16"] | None = Field(None, description="of our training steps; None: as the recipes choose it here")
    against: Literal["none", "torch"] = Field("none", description="in train and decode, measure PyTorch beside it, eager and compiled")
    torch_python: Path | None = Field(None, description="an interpreter that has torch; None: this one")
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = Field(None, description="also write the figures here")
    run_dir: Path | None = Field(
        None, description="folder of figures and pictures; parts already there are kept. None: runs/benchmark-DATE"
    )

    sequences: tuple[int, ...] = Field((1, 4, 16), description="decode: sequences together")
    prompt: int = Field(128, ge=1, description="decode: tokens of a prompt; a prefill of 1,024 is measured besides")
    new: int = Field(128, ge=1, description="decode: tokens drawn after each prompt")
    slots: tuple[int, ...] = Field((384, 2048), description="decode: places of the cache")
    data: str = Field("stdlib", description="pipeline: the corpus, in the words of pretrain_small's --data")
    widths: tuple[int, ...] = Field((128, 256, 384, 512, 768, 1024), description="growth: d_model; heads and d_ff go along")
    depths: tuple[int, ...] = Field((2, 4, 6, 8, 12, 16), description="growth: layers")
    seqs: tuple[int, ...] = Field(
        (256, 512, 1024, 2048, 4096, 8192), description="growth: tokens of a row, rows fewer to the same tokens a step"
    )
    batches: tuple[int, ...] = Field((1, 2, 4, 8, 16, 32), description="growth: rows of a batch")
    remats: tuple[RematName, ...] = Field(get_args(RematName), description="memory: what the backward pass recomputes")
    layers: tuple[LayersName, ...] = Field(get_args(LayersName), description="memory: blocks one by one, or as a scan")
    micro_batches: tuple[int, ...] = Field((1, 2, 4), description="memory: pieces a batch is cut into")


def check(config: Config) -> None:
    """**Raises:** `ValueError`, in words, where what is asked for is not there or cannot be."""
    unknown = [size for size in config.sizes if size not in SIZES]
    if unknown or not config.sizes:
        raise ValueError(f"--sizes must be some of {', '.join(SIZES)}, got {', '.join(config.sizes) or 'none'}")
    for flag in ("sequences", "slots", "widths", "depths", "seqs", "batches", "micro_batches"):
        if too_small := [number for number in getattr(config, flag) if number < 1]:
            raise ValueError(f"--{flag.replace('_', '-')} must be 1 or more each, got {too_small[0]}")
    first = config.sizes[0]
    head_dim = SIZES[first]["d_model"] // SIZES[first]["n_heads"]
    if odd := [width for width in config.widths if width % head_dim]:
        raise ValueError(f"--widths must be multiples of the width of a head of {first} ({head_dim}), got {odd[0]}")


def spec_of(size: dict[str, int], config: Config, **changes: Any) -> dict[str, Any]:
    """What a process that takes training steps is told (`recipes.benchmark_ours`)."""
    return {"kind": "train", "size": size, "backend": "cpu", "dtype": config.dtype, "steps": config.steps} | changes


class Figures(dict[str, Any]):
    """What was measured, by part. `keep` writes it to its file, after each case: a run that was stopped goes on with those it lacks."""

    def __init__(self, path: Path) -> None:
        super().__init__(json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {})
        self.path = path

    def keep(self) -> None:
        write_json(self.path, self)


def few(config: Config) -> Config:
    """The same with the rounds and steps of a part that compares many cases."""
    return config.model_copy(update={"rounds": min(config.rounds, FEW), "steps": min(config.steps, FEW)})


def tokens_of(size: dict[str, int]) -> int:
    """Tokens of a step."""
    return size["batch"] * size["seq"]


def flops_of(size: dict[str, int], n_params: int) -> float:
    """FLOPs of a step."""
    return tokens_of(size) * model_flops_per_token(n_params, size["n_layers"], size["d_model"], size["seq"])
