"""Pretrain a model of 1.1 billion parameters from scratch on one GPU, over days.

The experiment is that of `recipes.pretrain_small`, told there from top to bottom; this page holds other values and where they come from.
The text is the 10-billion-token sample of FineWeb-Edu (Penedo et al. 2024, arXiv:2406.17557), some 30 GB to download and passed over
about twice; up to four passes are worth nearly as much as new text (Muennighoff et al. 2023, arXiv:2305.16264). `--data` takes any other.

    uv run --extra cuda --extra data python -m recipes.pretrain_1b                  # an H100 (80 GB)
    uv run --extra cuda --extra data python -m recipes.pretrain_1b --preset a6000   # an RTX A6000 (48 GB), a quarter of the tokens
    uv run --extra plan python -m recipes.plan pretrain_1b --target h100            # does it fit, how long would it take; no card needed

How long: 21,000 steps of 1,048,576 tokens, 22 billion tokens or 20 a parameter, take 115 hours on an H100; the 5,250 steps of preset
`a6000` 184 hours on an RTX A6000. That is computed, not measured: tokens · (6 N + 12 L d T) FLOPs over the card's peak times an assumed
MFU of 40 % (`docs/gpu.md` has the arithmetic and what others measured). No run of this recipe on a card exists yet, so there is no loss
to expect either.

Sources of the settings:

- sizes: Llama 3.2 1B's 16 layers, 2,048 wide, MLPs of 8,192, in the drawing of Qwen3 (arXiv:2505.09388) with the 16 query and 8 key heads
  of its 1.7B: heads of 128 make half the score matrices that heads of 64 would;
- 49,152 tokens: SmolLM2 (arXiv:2502.02737); the vocabulary itself is learned from the text;
- 1,048,576 tokens a step: the 1 M of GPT-3 XL, 1.3 B (arXiv:2005.14165, table 2.1); rows of 2,048: TinyLlama (arXiv:2401.02385);
- peak learning rate 4e-4: TinyLlama, 1.1 B, AdamW at 2 M tokens a step; Muon takes over AdamW's rate and decay as they are (Liu et al.
  2025, arXiv:2502.16982);
- weight decay 0.1, clipping at 1: GPT-3 (arXiv:2005.14165, appendix B); linear decay to zero: Bergsma et al. 2025 (arXiv:2502.15938);
- 20 tokens a parameter: Hoffmann et al. 2022 (arXiv:2203.15556);
- our choice: 3 % warm-up, what is held out and measured, the tokenizer's share of the text, intervals, micro-batches, what is recomputed.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from data.tokenizer import SPECIAL_TOKENS
from recipes import pretrain_small
from recipes.command_line import fail, parse, resumable
from recipes.running import ENDS_IN_WORDS
from train.optimizers import OptimizerConfig, ScheduleConfig
from train.step import StepConfig

# ------------------------------------------------------------------------------------------- config


class Config(pretrain_small.Experiment):
    """The values of this recipe; what is not named is as in `pretrain_small`. Presets say what fits on which card."""

    preset: Literal["h100", "a6000"] = Field("h100", description="the card: how many pieces a batch is cut into, and how many steps")
    data: str = Field("hf://HuggingFaceFW/fineweb-edu/10BT", description="the corpus, as in pretrain_small")
    held_out_documents: int | None = Field(5_000, ge=1, description="held-out documents measured, of half a million; None: all")
    tokenizer_documents: int | None = Field(200_000, ge=1, description="training documents that the tokenizer is learned from; None: all")
    vocab: int = Field(49_152, ge=256 + len(SPECIAL_TOKENS), description="tokens of the vocabulary to be learned, special ones included")
    d_model: int = Field(2048, gt=0, description="width of the residual stream")
    n_layers: int = Field(16, gt=0, description="blocks")
    n_heads: int = Field(16, gt=0, description="query heads of a block")
    n_kv_heads: int = Field(8, gt=0, description="key and value heads of a block; a divisor of n-heads")
    d_ff: int = Field(8192, gt=0, description="hidden width of the MLPs")
    seq: int = Field(2048, gt=1, description="tokens of a row, and the context of the model")
    batch: int = Field(512, gt=0, description="rows a step; tokens a step = batch x seq")
    remat: Literal["none", "dots", "full"] = resumable("full", description="what the backward pass recomputes to save memory")

    steps: int | None = resumable(21_000, ge=1, description="optimizer steps: 20 tokens a parameter")
    optimizer: OptimizerConfig = OptimizerConfig(name="muon", weight_decay=0.1)
    schedule: ScheduleConfig = ScheduleConfig(shape="linear", peak=4e-4, warmup=0.03)
    step: StepConfig = StepConfig(micro_batches=64, clip_norm=1.0)

    save_every: int = resumable(100, ge=1, description="steps between checkpoints")
    validate_every: int = resumable(100, ge=1, description="steps between looks at the held-out loss")
    sample_every: int = resumable(500, ge=1, description="steps between samples on the screen")


PRESETS: dict[str, dict[str, Any]] = {
    "h100": {},
    "a6000": {"steps": 5250, "step": StepConfig(micro_batches=128, clip_norm=1.0)},
}

# ------------------------------------------------------------------------------------------- main


def main(config: Config) -> Path:
    """The whole experiment. Returns the run folder."""
    return pretrain_small.main(config, "pretrain_1b")


if __name__ == "__main__":
    chosen = parse(Config, __doc__ or "", recipe="pretrain_1b", presets=PRESETS, default_preset="h100")
    try:
        main(chosen)
    except ENDS_IN_WORDS as error:
        fail(str(error))
