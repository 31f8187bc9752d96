"""Reinforcement learning with verifiable rewards on a real language model, SmolLM2-135M-Instruct.

The task, by default: one sentence about a thing under a constraint that a program can check (`data/tasks/constraints.py`). The model can do
some of it from the start; from answers of its own and their rewards alone it learns the rest. Held-out prompts are about other things, with
other words. All weights are trained, in fp32 masters; sampler and trainer are one model.

    python -m recipes.grpo_smollm2
    python -m recipes.grpo_smollm2 --model SmolLM2-135M-Instruct.Q4_1.gguf --seed 1
    python -m recipes.grpo_smollm2 --task countdown --max-new-tokens 24
    python -m recipes.grpo_smollm2 --resume

Sources of the settings: DAPO (arXiv:2503.14476) without a KL, in small; prompts whose eight answers are all worth the same are drawn anew,
since the update takes most of the time. The learning rate is a single guess for thirty steps of a model of this size; models of billions of
parameters want 1e-6.
"""

from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import Field

from data.tasks import TASKS
from recipes.command_line import claimed, fail, parse, resumable
from recipes.reinforcement import RL_ENDS_IN_WORDS, RLConfig, reinforce_loaded
from recipes.running import check_start
from train.logs import plain_messages, words_kept
from train.runtime import choose_device, compilation_cache

GAP_LIMIT = (
    3e-4  # nats, in float32: rounding through thirty layers was seen to come to 1.2e-4 on a token, above what is asked of small models
)


class Config(RLConfig):
    """The values of this recipe; the others are as in `recipes.reinforcement`."""

    model: Path = Field(
        Path("HuggingFaceTB/SmolLM2-135M-Instruct"), description="where to begin: run, Hugging Face folder, GGUF file, or owner/name"
    )
    task: Literal["constraints", "countdown", "counting", "reversal"] = Field("constraints", description="see data/tasks")
    reward_weights: dict[str, float] = Field({}, description="weights of the task's rewards by name, in place of its own")
    algorithm: Literal["reinforce", "rloo", "grpo", "dr_grpo", "dapo", "gspo"] = Field("dapo", description="see the table in docs/rl.md")
    steps: int = resumable(30, ge=1, description="batches of answers to learn from")
    prompts: int = Field(3, ge=1, description="prompts a batch")
    n: int = Field(8, ge=1, description="answers to each")
    max_new_tokens: int = Field(24, ge=1, description="longest answer, its end included")
    peak: float = Field(1e-4, gt=0, description="learning rate, after the rise")
    overlong_buffer: int = Field(4, ge=1, description="dapo: tokens before the longest answer over which the length penalty grows to 1")
    most_draws: int = Field(3, ge=1, description="dapo: times that prompts are drawn for one batch, at most")
    dtype: Literal["auto", "float32", "bfloat16"] = resumable("auto", description="operands of the blocks' products; the head is fp32")
    answers: int = Field(2, ge=1, description="answers to each held-out problem in a look; pass@1 and pass@this are reported")
    validate_every: int = resumable(30, ge=1, description="steps between looks at the held-out problems")
    validate_rows: int = resumable(64, ge=1, description="held-out problems in such a look; the first and last one take all")
    sample_every: int = resumable(5, ge=1, description="steps between best and worst answers on the screen and in rollouts.jsonl")
    save_every: int = resumable(10, ge=1, description="steps between checkpoints")


def main(config: Config) -> Path:
    """The whole experiment. Returns the run folder."""
    plain_messages()
    folder = config.run_dir or Path("runs") / f"grpo_smollm2-{datetime.now():%Y%m%d-%H%M%S}"
    with claimed(folder, "grpo_smollm2"), words_kept(folder):
        run(config, folder)
    return folder


def run(config: Config, folder: Path) -> None:
    """Task, model, reinforcement, report, in this order."""
    device = choose_device(config.device)
    compilation_cache()
    check_start(config, folder)

    task = TASKS[config.task]().weighted(config.reward_weights)
    reinforce_loaded(config, folder, config.model, task, device, "grpo_smollm2", fp32_gap=GAP_LIMIT)


if __name__ == "__main__":
    chosen = parse(Config, __doc__ or "", recipe="grpo_smollm2")
    try:
        main(chosen)
    except RL_ENDS_IN_WORDS as error:
        fail(str(error))
