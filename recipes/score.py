"""What answers are worth to a reward model: a file of them scored and ranked, or a function to call.

    python -m recipes.score runs/reward_model-… answers.jsonl                       # each record again, with its rewards
    python -m recipes.score runs/reward_model-… pairs.jsonl --out scored.jsonl      # of pairs also: how often the chosen one wins

A record is one of

    {"prompt": "12+7=", "answer": "19"}                       gets "reward"
    {"prompt": "12+7=", "answers": ["19", "18", "20"]}        gets "rewards" and "best", the place of the highest
    {"messages": [user, …, assistant]}                        gets "reward", of the last message
    {"prompt": "12+7=", "chosen": "19", "rejected": "18"}     gets "rewards", of both; any shape that `recipes.dpo` reads

The same in Python, for ranking, and as a reward of a task (`data.tasks.problems.Reward`):

    from recipes.score import Scorer

    scorer = Scorer.load("runs/reward_model-…")
    scorer.score(["12+7="] * 2, ["19", "18"])     # → an array of two rewards
    scorer.best("12+7=", ["18", "19"])            # → 1
    scorer.as_reward()                            # (problem, answer) → number
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro
from jaxtyping import Float
from loguru import logger
from pydantic import Field

from data.preferences import messages_of, pair_of, records_of
from data.tasks.problems import Problem, Reward
from data.tokenizer import Tokenizer
from lm.hub import folder_of
from recipes.command_line import RecipeConfig, fail
from recipes.prompting import Prompting
from recipes.running import ENDS_IN_WORDS, RunConfig, choose_flight
from train.backends import attention_of
from train.intervals import Estimate, wilson
from train.logs import plain_messages, progress
from train.reward_model import RewardBatch, RewardModel, load_reward_model, make_rewards, pair_metrics
from train.runtime import choose_device, device_facts

Prompt = str | Sequence[Mapping[str, str]]  # a text, or messages of which the last is not the assistant's
Device = Literal["auto", "cpu", "gpu", "tpu"]
DType = Literal["auto", "float32", "bfloat16"]
LEAST_WIDTH = 16  # tokens; rows are as wide as this times a power of two, so that few programs serve all


@dataclass(frozen=True)
class Scorer:
    """A reward model that reads text."""

    model: RewardModel
    prompting: Prompting
    rewards: Callable[[RewardModel, RewardBatch], np.ndarray]
    rows: int  # texts at a time

    @staticmethod
    def load(source: str | Path, *, rows: int = 64, device: Device = "auto", dtype: DType = "auto") -> "Scorer":
        """From a run of `recipes.reward_model` that has ended, or a folder like its `export/`, here or on the Hub.

        **Arguments:**

        - `rows`: texts at a time.
        - `dtype`: operands of the blocks' products; `auto`: as recipes choose for the device.
        """
        where = choose_device(device)
        folder = reward_folder(source)
        model = load_reward_model(folder)
        sizes = {"n_layers": model.base.config.n_layers, "seq": model.base.config.context}
        ops, flight = choose_flight(RunConfig(dtype=dtype), device_facts(where), **sizes, **attention_of(model.base))
        return Scorer(model, Prompting.of(Tokenizer.load(folder)), make_rewards(flight, ops), rows)

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> Float[np.ndarray, " answers"]:
        """The reward of each answer to its prompt.

        **Raises:** `ValueError` where prompt and answer are longer than the model's context.
        """
        texts = [self._tokens(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        found = np.zeros(len(texts), np.float32)
        order = np.argsort([len(text) for text in texts], kind="stable")
        with progress("scoring", len(texts)) as bar:
            for at in range(0, len(texts), self.rows):
                some = order[at : at + self.rows]
                found[some] = self.rewards(self.model, self._batch([texts[i] for i in some]))
                bar(at + len(some))
        return found

    def best(self, prompt: Prompt, answers: Sequence[str]) -> int:
        """The place of the answer with the highest reward."""
        return int(np.argmax(self.score([prompt] * len(answers), answers)))

    def as_reward(self) -> Reward:
        """For a task's `rewards`: one answer at a time, as they are asked."""

        def learned_reward(problem: Problem, answer: str) -> float:
            return float(self.score([problem.prompt], [answer])[0])

        return learned_reward

    def _tokens(self, prompt: Prompt, answer: str) -> np.ndarray:
        """Prompt and answer with its end, as in training."""
        before = self.prompting.prompt(prompt) if isinstance(prompt, str) else self.prompting.conversation(prompt)
        whole = np.concatenate([before, self.prompting.answer(answer)[0]])
        if len(whole) > (context := self.model.base.config.context):
            raise ValueError(f"prompt and answer have {len(whole)} tokens, more than the model's context of {context}: {answer[:60]!r}")
        return whole

    def _batch(self, texts: Sequence[np.ndarray]) -> RewardBatch:
        """A row a text; rows and columns are filled up, so that few shapes occur."""
        widest = max(map(len, texts))
        width = min(LEAST_WIDTH << max(0, -(-widest // LEAST_WIDTH) - 1).bit_length(), self.model.base.config.context)
        rows = min(1 << (len(texts) - 1).bit_length(), self.rows)
        return rows_of_texts(texts, rows=rows, width=width)


def rows_of_texts(texts: Sequence[np.ndarray], *, rows: int, width: int) -> RewardBatch:
    """A row a text, padded on the right; rows beyond the texts are padding."""
    tokens, positions, segments = (np.zeros((rows, width), np.int32) for _ in range(3))
    for row, text in enumerate(texts):
        tokens[row, : len(text)], positions[row, : len(text)], segments[row, : len(text)] = text, np.arange(len(text)), 1
    return RewardBatch(tokens, positions, segments)


def reward_folder(source: str | Path) -> Path:
    """Where a reward model lies: a run's `export/`, a folder, or what is fetched from the Hub.

    **Raises:** `ValueError` for a run that has not ended.
    """
    folder = folder_of(f"{source}")
    if (folder / "export").is_dir():
        return folder / "export"
    if (folder / "checkpoints").is_dir():
        raise ValueError(f"{folder} is a run that has not ended, so there is no export/ to score with: let it go on with --resume")
    return folder


# ------------------------------------------------------------------------------------------- files


class Asked(NamedTuple):
    """A record, and the answers in it."""

    record: dict[str, Any]
    prompt: Prompt
    answers: list[str]
    kind: Literal["answer", "answers", "pair"]


def asked_of(record: Any) -> Asked:
    """**Raises:** `ValueError`, `KeyError` or `TypeError` for a record of none of the shapes above."""
    if not isinstance(record, dict):
        raise TypeError(f"expected an object, got {record!r}")
    if "chosen" in record:
        pair = pair_of(record)
        return Asked(record, pair.messages, [pair.chosen, pair.rejected], "pair")
    if "messages" in record:
        *before, last = messages_of(record["messages"], "user")
        if last["role"] != "assistant" or not before:
            raise ValueError("messages must end with one of the assistant, behind others")
        return Asked(record, before, [last["content"]], "answer")
    if "prompt" not in record or ("answer" in record) == ("answers" in record):
        raise ValueError(f"expected prompt and either answer or answers, chosen and rejected, or messages; got {', '.join(record)}")
    prompt = messages_of(record["prompt"], "user")
    answers = record["answers"] if "answers" in record else [record["answer"]]
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise TypeError(f"expected texts as answers, got {answers!r}")
    return Asked(record, prompt, answers, "answers" if "answers" in record else "answer")


def read_asked(path: Path) -> list[Asked]:
    """All records of a file. **Raises:** `ValueError` that names the one that cannot be scored."""
    found = []
    for number, record in enumerate(records_of(path), start=1):
        try:
            found.append(asked_of(record))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"record {number} of '{path}' cannot be scored: {error}") from error
    if not found:
        raise ValueError(f"'{path}' has no records")
    return found


def with_rewards(asked: Sequence[Asked], rewards: np.ndarray) -> Iterator[dict[str, Any]]:
    """Each record again, with what its answers are worth."""
    first = 0
    for each in asked:
        own = [round(float(reward), 6) for reward in rewards[first : first + len(each.answers)]]
        first += len(own)
        if each.kind == "answer":
            yield each.record | {"reward": own[0]}
        else:
            yield each.record | {"rewards": own} | ({"best": int(np.argmax(own))} if each.kind == "answers" else {})


def accuracy(chosen: np.ndarray, rejected: np.ndarray) -> Estimate:
    """How often the chosen answer has the higher reward, with Wilson's interval over pairs; equal ones count a half."""
    told = pair_metrics(chosen, rejected)
    return wilson(float(np.sum(told["accuracy"])), len(chosen))


class Config(RecipeConfig):
    """What to score with what."""

    model: Annotated[Path, tyro.conf.Positional] = Field(description="run of recipes.reward_model, its export/, or owner/name on the Hub")
    file: Annotated[Path, tyro.conf.Positional] = Field(description="records of prompts and answers: .json, .jsonl, or either with .gz")
    out: Path | None = Field(None, description="where the records go, with their rewards; None: to the screen")
    rows: int = Field(64, ge=1, description="texts at a time")
    device: Device = Field("auto", description="where to compute")
    dtype: DType = Field("auto", description="operands of the blocks' products")


def main(config: Config) -> list[dict[str, Any]]:
    """Score the file."""
    plain_messages()
    asked = read_asked(config.file)
    if config.out is not None and config.out.exists():
        raise ValueError(f"{config.out} exists: name another file with --out, or remove it")
    scorer = Scorer.load(config.model, rows=config.rows, device=config.device, dtype=config.dtype)
    prompts = [each.prompt for each in asked for _ in each.answers]
    rewards = scorer.score(prompts, [answer for each in asked for answer in each.answers])
    records = list(with_rewards(asked, rewards))
    with nullcontext(sys.stdout) if config.out is None else config.out.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    pairs = np.asarray([record["rewards"] for record, each in zip(records, asked, strict=True) if each.kind == "pair"])
    if len(pairs):
        found = accuracy(pairs[:, 0], pairs[:, 1])
        logger.info(f"of {len(pairs):,} pairs the chosen one wins {found.value:.1%} ({found.low:.1%} to {found.high:.1%})")
    return records


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__, prog="python -m recipes.score"))
    except ENDS_IN_WORDS as error:
        fail(str(error))
