"""Grade-school mathematics by rewards alone: GRPO on GSM8K with Qwen3-0.6B or Qwen3-1.7B, on one H100.

Not run on a card yet: none was at hand. What its three programs take of a card's memory is computed by `recipes.plan_rl`, which compiles
them; everything else about a run there is an expectation.

    uv run --extra cuda python -m recipes.grpo_gsm8k --data train.jsonl --held-out test.jsonl
    uv run --extra cuda python -m recipes.grpo_gsm8k --preset qwen3-1.7b --data train.jsonl --held-out test.jsonl
    uv run --extra plan python -m recipes.plan_rl --preset qwen3-1.7b --target h100
    python -m recipes.grpo_gsm8k --resume

`--data` and `--held-out` are files of `{"question", "answer"}` as OpenAI's grade-school-math has them (7,473 and 1,319 records). An answer
is right if the number behind its first `####` is the reference's, as the paper's code decides (Cobbe et al. 2021, arXiv:2110.14168). It is
asked for at the end of each prompt (`--ask`); `/no_think` there is Qwen3's own switch: without it the model writes its thoughts first, for
which `--max-new-tokens` would have to be some thousands.

Sources of the settings, all published; none has been tried here:

    learning rate 1e-6            DeepSeekMath (arXiv:2402.03300, section 4.2); verl, examples/grpo_trainer/run_qwen3-1.7b.sh
    KL k3, weight 0.001           the same file (kl_loss_type=low_var_kl, kl_loss_coef=0.001)
    AdamW 0.9, 0.999; decay 0.01  verl's defaults (verl/trainer/config/optim/fsdp.yaml), as is the gradient's clip at 1
    clip 0.2                      PPO (arXiv:1707.06347), GRPO
    8 answers, temperature 1      Dr. GRPO's scripts (sail-sg/understand-r1-zero, examples/qwen2.5-math-1.5b.sh); verl's file has 3 answers
    512 new tokens                verl, examples/grpo_trainer/run_qwen2-7b.sh; run_qwen3-1.7b.sh has 1,024, with thinking

Not theirs: the batch. verl has 1,024 prompts a step on 8 cards, Dr. GRPO 128; one card draws 32 (of Qwen3-1.7B 16) prompts at once, as the
plan says it can, and 700 steps are then three passes (1.7B: one and a half) over the problems, where verl makes fifteen.
"""

from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from data.tasks import gsm8k
from data.tasks.problems import Task
from recipes.command_line import claimed, fail, parse, resumable
from recipes.reinforcement import RL_ENDS_IN_WORDS, RLConfig, reinforce_loaded
from recipes.running import check_start
from train.logs import plain_messages, words_kept
from train.optimizers import OptimizerConfig
from train.runtime import choose_device, compilation_cache
from train.step import StepConfig

PRESETS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {"model": Path("Qwen/Qwen3-0.6B"), "prompts": 32, "step": StepConfig(micro_batches=16)},
    "qwen3-1.7b": {"model": Path("Qwen/Qwen3-1.7B"), "prompts": 16, "step": StepConfig(micro_batches=16)},
}


class Config(RLConfig):
    """The values of this recipe; the others are as in `recipes.reinforcement`."""

    preset: Literal["qwen3-0.6b", "qwen3-1.7b"] = Field("qwen3-0.6b", description="model and batch that go together on one H100")
    model: Path = Field(
        Path("Qwen/Qwen3-0.6B"), description="where to begin: run, Hugging Face folder, GGUF file, or owner/name on the Hub"
    )
    data: Path | None = Field(None, description="problems to learn from: .jsonl, .jsonl.gz of question and answer; needed")
    held_out: Path | None = Field(None, description="problems to be measured on, likewise; None: a twentieth of --data")
    ask: str = Field(f"{gsm8k.ASK} /no_think", description="what stands behind each question")
    algorithm: Literal["reinforce", "rloo", "grpo", "dr_grpo", "dapo", "gspo"] = Field("grpo", description="see the table in docs/rl.md")
    steps: int = resumable(700, ge=1, description="batches of answers to learn from")
    prompts: int = Field(32, ge=1, description="prompts a batch")
    n: int = Field(8, ge=1, description="answers to each")
    max_new_tokens: int = Field(512, ge=1, description="longest answer, its end included")
    peak: float = Field(1e-6, gt=0, description="learning rate, after the rise")
    optimizer: OptimizerConfig = OptimizerConfig(name="adamw", beta2=0.999, weight_decay=0.01)
    step: StepConfig = StepConfig(micro_batches=16)
    kl_weight: float = Field(0.001, ge=0, description="of the KL from the model RL began with; 0: none, and it is not computed")
    overlong_buffer: int = Field(128, ge=1, description="dapo: tokens before the longest answer over which the length penalty grows to 1")
    dtype: Literal["auto", "float32", "bfloat16"] = resumable("auto", description="operands of the blocks' products; the head is fp32")
    remat: Literal["none", "dots", "full"] = resumable("full", description="what the backward pass recomputes to save memory")
    answers: int = Field(1, ge=1, description="answers to each held-out problem in a look; pass@1 and pass@this are reported")
    validate_every: int = resumable(50, ge=1, description="steps between looks at the held-out problems")
    validate_rows: int = resumable(256, ge=1, description="held-out problems in such a look; the first and last one take all")
    sample_every: int = resumable(50, ge=1, description="steps between best and worst answers on the screen and in rollouts.jsonl")
    save_every: int = resumable(50, ge=1, description="steps between checkpoints")

    @property
    def task(self) -> Task:
        """The problems of the files.

        **Raises:** `ValueError` where there is no file, or no problem in one.
        """
        if self.data is None:
            raise ValueError("--data is missing: name a file of GSM8K, a JSON object with question and answer a line")
        records = gsm8k.read(self.data)
        train, held_out = (records, gsm8k.read(self.held_out)) if self.held_out is not None else gsm8k.split(records)
        return gsm8k.task(train, held_out, ask=self.ask)


def main(config: Config) -> Path:
    """The whole experiment. Returns the run folder."""
    plain_messages()
    folder = config.run_dir or Path("runs") / f"grpo_gsm8k-{datetime.now():%Y%m%d-%H%M%S}"
    with claimed(folder, "grpo_gsm8k"), words_kept(folder):
        run(config, folder)
    return folder


def run(config: Config, folder: Path) -> None:
    """Task, model, reinforcement, report, in this order."""
    device = choose_device(config.device)
    compilation_cache()
    check_start(config, folder)
    reinforce_loaded(config, folder, config.model, config.task, device, "grpo_gsm8k")


if __name__ == "__main__":
    chosen = parse(Config, __doc__ or "", recipe="grpo_gsm8k", presets=PRESETS, default_preset="qwen3-0.6b")
    try:
        main(chosen)
    except RL_ENDS_IN_WORDS as error:
        fail(str(error))
