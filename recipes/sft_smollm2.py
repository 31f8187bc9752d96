"""Fine-tune a real language model, SmolLM2-135M, on a file of instructions or conversations.

The file may be in any of the usual formats (`data.conversations`): messages, ShareGPT with tool calls, pairs, Alpaca's columns. The model's
own chat template is used where it has one and can write what the file holds; for tool calls, of which SmolLM2's template knows nothing, say
`--template chatml`. Everything is measured before and after: loss on held-out answers, bits per byte of the standard library's source (what
is forgotten), small tasks and tool calls with intervals, and answers to fixed prompts.

    python -m recipes.sft_smollm2 --data dolly.jsonl
    python -m recipes.sft_smollm2 smollm2-135m-instruct/ --data calls.json --template chatml --adapter.kind lora
    python -m recipes.sft_smollm2 --resume

Without `--adapter.kind` all weights are trained.

Sources of the settings: AdamW and a peak of 1e-4 are a single guess, for a thousand examples. One pass: in a second one the held-out loss
rose again (2.32 to 2.35 nats, two seeds; docs/sft.md).
"""

from pathlib import Path
from typing import Annotated

import tyro
from pydantic import Field

from recipes import sft_chat
from recipes.command_line import fail, parse, resumable
from recipes.running import ENDS_IN_WORDS
from train.optimizers import OptimizerConfig, ScheduleConfig


class Config(sft_chat.Experiment):
    """The values of this recipe; what is not named is as in `sft_chat`."""

    source: Annotated[Path, tyro.conf.Positional] = Field(
        Path("HuggingFaceTB/SmolLM2-135M-Instruct"),
        description="the model to begin with: run, Hugging Face folder, GGUF file, or owner/name",
    )
    text: str = Field("stdlib", description="text that may be forgotten, as --data of pretrain_small; none: it is not measured")
    text_bytes: int = Field(60_000, ge=1000, description="bytes of its held-out part that are measured")
    seq: int | None = Field(512, gt=1, description="tokens of a row; None: the model's context, 1024 at most")
    batch: int = Field(4, gt=0, description="rows a step; tokens a step = batch x seq")
    epochs: float = Field(1.0, gt=0, allow_inf_nan=False, description="passes over the conversations, where --steps is not given")
    optimizer: OptimizerConfig = OptimizerConfig(name="adamw", weight_decay=0.0)
    schedule: ScheduleConfig = ScheduleConfig(peak=1e-4, warmup=0.05)
    save_every: int = resumable(50, ge=1, description="steps between checkpoints")
    validate_every: int = resumable(25, ge=1, description="steps between looks at the held-out loss")
    sample_every: int = resumable(50, ge=1, description="steps between answers on the screen")
    questions: int = resumable(20, ge=0, description="held-out instructions of each task, and tool calls, asked before and after; 0: none")
    prompts: tuple[str, ...] = resumable(
        (
            "What is the capital of France?",
            "Name three uses of a brick.",
            "Explain in one sentence why the sky is blue.",
            'Write the word "lamp" backwards.',
            "What is 17 + 25?",
        ),
        description="what the model is asked before and after",
    )


def main(config: Config) -> Path:
    """The whole experiment. Returns the run folder."""
    return sft_chat.main(config, "sft_smollm2")


if __name__ == "__main__":
    chosen = parse(Config, __doc__ or "", recipe="sft_smollm2")
    try:
        main(chosen)
    except ENDS_IN_WORDS as error:
        fail(str(error))
