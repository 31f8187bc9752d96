"""Have EleutherAI's lm-eval examine one of our models: its tasks, its prompts, its metrics, our weights and kernels.

    python -m recipes.harness MODEL --tasks arc_easy piqa --limit 100
    python -m recipes.harness MODEL --tasks my_task --include-path my_tasks/
    python -m recipes.harness MODEL --tasks gsm8k --shots 5 --chat-template --out gsm8k.json

MODEL is a run, a Hugging Face folder, a GGUF file, or owner/name on the Hub. Tasks are those of lm-eval, most of which it fetches from the
Hub, and those of YAML files in --include-path. Needs `uv pip install lm-eval`. Within Python, or with lm-eval's own command line, the model
type is `zmaj` once `recipes.harness_model` is imported (docs/evaluation.md).
"""

import importlib.util
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from loguru import logger
from pydantic import Field

from recipes.command_line import RecipeConfig, fail
from recipes.running import ENDS_IN_WORDS
from train.logs import plain_messages, write_json
from train.runtime import compilation_cache


class Config(RecipeConfig):
    """Which model, which of lm-eval's tasks, and how it is asked."""

    model: Annotated[str, tyro.conf.Positional] = Field(description="run, Hugging Face folder, GGUF file, or owner/name on the Hub")
    tasks: tuple[str, ...] = Field(min_length=1, description="names that lm-eval knows, or finds in --include-path")
    include_path: Path | None = Field(None, description="folder with YAML files of tasks")
    shots: int | None = Field(None, ge=0, description="solved examples before each question; None: as the task says")
    limit: int | None = Field(None, ge=1, description="the first so many questions of each task; None: all")
    chat_template: bool = Field(False, description="ask as the user of a conversation, by the tokenizer's template")
    system: str | None = Field(None, description="system message")
    seed: int = Field(1234, ge=0, description="of examples and of what is sampled; lm-eval's own default")
    batch_tokens: int = Field(4096, ge=1, description="tokens computed at a time when reading, about")
    rows: int = Field(16, ge=1, description="answers written at a time")
    max_length: int | None = Field(None, ge=2, description="context in tokens; None: the model's")
    out: Path | None = Field(None, description="JSON file to write the results to, with every answer")
    device: Literal["auto", "cpu", "gpu", "tpu"] = Field("auto", description="where to compute")
    backend: str = Field("auto", description="kernels, as in recipes.evaluate")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="operands of matrix products; auto: as in training")


def main(config: Config) -> dict[str, Any]:
    """lm-eval's results, shown as it shows them."""
    plain_messages()
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("this needs lm-eval, which is not installed: run `uv pip install lm-eval`. `recipes.evaluate` goes without it")
    import lm_eval  # only here: it is an extra
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable, make_table

    from recipes.harness_model import ZmajLM

    compilation_cache()
    manager = TaskManager(include_path=None if config.include_path is None else str(config.include_path))
    if unknown := [name for name in config.tasks if name not in manager.all_tasks]:
        where = "" if config.include_path is None else f" nor in {config.include_path}"
        raise ValueError(f"lm-eval has no task {', '.join(unknown)}{where}: `lm_eval ls tasks` lists those it has")
    settings = {name: getattr(config, name) for name in ("dtype", "backend", "device", "batch_tokens", "max_length", "seed")}
    model = ZmajLM(config.model, batch_size=config.rows, **settings)
    logger.info(f"{model.origin}: {model.model.n_params:,} parameters, kernels {model.ops.name}, {model.flight.dtype}")
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=list(config.tasks),
        num_fewshot=config.shots,
        limit=config.limit,
        apply_chat_template=config.chat_template,
        system_instruction=config.system,
        task_manager=manager,
        random_seed=config.seed,
        numpy_random_seed=config.seed,
        torch_random_seed=config.seed,
        fewshot_random_seed=config.seed,
    )
    assert results is not None, "it is None in the other processes of several"
    print(make_table(results))
    told = model.speed.record()
    if told["tokens"]:
        logger.info(f"{told['tokens']:,} real tokens read in {told['places']:,} places, {told['tokens_per_s']:,.0f} real tokens/s")
    if config.out is not None:
        write_json(config.out, json.loads(json.dumps(results, default=handle_non_serializable)))
        logger.info(f"written {config.out}")
    return results


if __name__ == "__main__":
    chosen = tyro.cli(Config, description=__doc__, prog="python -m recipes.harness")
    try:
        main(chosen)
    except ENDS_IN_WORDS as error:
        fail(str(error))
