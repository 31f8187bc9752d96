"""Pretrain a model of GPT-2 small's size, 124 million parameters, from scratch on one GPU.

The experiment is that of `recipes.pretrain_small`, told there from top to bottom; this page holds other values and where they come from.
The text is the 10-billion-token sample of FineWeb-Edu (Penedo et al. 2024, arXiv:2406.17557), some 30 GB to download; `--data` takes any
other.

    uv run --extra cuda --extra data python -m recipes.pretrain_124m                  # an H100 (80 GB)
    uv run --extra cuda --extra data python -m recipes.pretrain_124m --preset a6000   # an RTX A6000 (48 GB)
    uv run --extra plan python -m recipes.plan pretrain_124m --target h100            # does it fit, how long would it take; no card needed

How long: 4,768 steps of 524,288 tokens, 2.5 billion tokens or 20 a parameter, take 1.5 hours on an H100 and 9.6 on an RTX A6000. That is
computed, not measured: tokens · (6 N + 12 L d T) FLOPs over the card's peak times an assumed MFU of 40 % (`docs/gpu.md` has the
arithmetic and what others measured). No run of this recipe on a card exists yet, so there is no loss to expect either.

Sources of the settings:

- sizes: GPT-2 small (Radford et al. 2019): 12 layers, 768 wide, 12 heads, context 1,024; in the drawing of Qwen3 (RMSNorm, QK-norm, RoPE,
  SwiGLU, no biases, tied embeddings; arXiv:2505.09388), whose MLP has as many parameters with a hidden width of 2,048 as GPT-2's with
  3,072;
- 50,304 tokens: GPT-2's 50,257 made a multiple of 128, as in nanoGPT; the vocabulary itself is learned from the text;
- 524,288 tokens a step: the 0.5 M of GPT-3 Small (arXiv:2005.14165, table 2.1), as in llm.c (`scripts/run_gpt2_124M.sh`);
- peak learning rate 1.8e-3 and 2.6 % warm-up: modded-nanogpt's second record (`records/060624_AdamW`), three times that of GPT-3 Small;
  Muon takes over AdamW's rate and decay as they are (Liu et al. 2025, arXiv:2502.16982), but that was not shown at this size;
- weight decay 0.1, clipping at 1: GPT-3 (arXiv:2005.14165, appendix B); linear decay to zero: Bergsma et al. 2025 (arXiv:2502.15938);
- 20 tokens a parameter: Hoffmann et al. 2022 (arXiv:2203.15556). `--steps 19073` makes the 10 billion tokens of llm.c's run;
- our choice: what is held out and measured, the tokenizer's share of the text, intervals, micro-batches.
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

    preset: Literal["h100", "a6000"] = Field("h100", description="the card: how many pieces a batch is cut into")
    data: str = Field("hf://HuggingFaceFW/fineweb-edu/10BT", description="the corpus, as in pretrain_small")
    held_out_documents: int | None = Field(5_000, ge=1, description="held-out documents measured, of half a million; None: all")
    tokenizer_documents: int | None = Field(200_000, ge=1, description="training documents that the tokenizer is learned from; None: all")
    vocab: int = Field(50_304, ge=256 + len(SPECIAL_TOKENS), description="tokens of the vocabulary to be learned, special ones included")
    d_model: int = Field(768, gt=0, description="width of the residual stream")
    n_layers: int = Field(12, gt=0, description="blocks")
    n_heads: int = Field(12, gt=0, description="query heads of a block")
    n_kv_heads: int = Field(12, gt=0, description="key and value heads of a block; a divisor of n-heads")
    d_ff: int = Field(2048, gt=0, description="hidden width of the MLPs, 8/3 of d-model")
    seq: int = Field(1024, gt=1, description="tokens of a row, and the context of the model")
    batch: int = Field(512, gt=0, description="rows a step; tokens a step = batch x seq")

    steps: int | None = resumable(4768, ge=1, description="optimizer steps: 20 tokens a parameter")
    optimizer: OptimizerConfig = OptimizerConfig(name="muon", weight_decay=0.1)
    schedule: ScheduleConfig = ScheduleConfig(shape="linear", peak=1.8e-3, warmup=0.026)
    step: StepConfig = StepConfig(micro_batches=16, clip_norm=1.0)

    save_every: int = resumable(500, ge=1, description="steps between checkpoints")
    validate_every: int = resumable(250, ge=1, description="steps between looks at the held-out loss")
    sample_every: int = resumable(500, ge=1, description="steps between samples on the screen")


PRESETS: dict[str, dict[str, Any]] = {
    "h100": {},
    "a6000": {"step": StepConfig(micro_batches=32, clip_norm=1.0)},
}

# ------------------------------------------------------------------------------------------- main


def main(config: Config) -> Path:
    """The whole experiment. Returns the run folder."""
    return pretrain_small.main(config, "pretrain_124m")


if __name__ == "__main__":
    chosen = parse(Config, __doc__ or "", recipe="pretrain_124m", presets=PRESETS, default_preset="h100")
    try:
        main(chosen)
    except ENDS_IN_WORDS as error:
        fail(str(error))
