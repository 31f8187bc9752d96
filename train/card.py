"""The model card: front matter in the Hub's format, then what is known of the model, each figure with where it came from.

`Card` holds the facts, `render` writes them. What is not known is said, not left out: a card without a comparison says `not compared`, one
without a licence `no licence given`.

Evaluations, here and in the files that `recipes.publish --eval` takes, are a dictionary by task:

    {"arc_easy": {"metric": "accuracy", "value": 0.412, "low": 0.392, "high": 0.432, "n": 2376, "of": "questions", "shots": 0}}

`metric` and `value` are needed. `low` and `high` bound the 95 % interval, `n` counts what was averaged and `of` names it. All other entries
that are numbers, words or truth values say how it was done, and stand in the table's last column; what is nested is not shown. An accuracy
is a fraction, and shown in percent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from train.card_training import data_section, lineage_section, settings_section, table
from train.lineage import GIVEN, Stage

YARDSTICKS = {"xz": "xz -9", "xz_primed": "xz -9, primed with the training text"}  # keys of a run's results

_NEEDED = {"metric", "value"}
_SHOWN = {*_NEEDED, "low", "high", "n", "of"}

NOT_COMPARED = "not compared: no independent implementation was at hand"
OURS_ALONE = "not compared: no other library has a model of this drawing"


@dataclass(frozen=True)
class Card:
    """The facts of a model card."""

    name: str  # what the page is called
    model: Mapping[str, Any]  # model_type, parameters and the fields of its config
    dtype: str  # of the tensors in the files
    stages: Sequence[Stage]  # oldest first (`train.lineage`)
    repository: str | None = None  # owner/name, once it is known
    evaluations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by task, shape as above
    evidence: Mapping[str, Any] = field(default_factory=dict)  # of the export: `read_back_equal`, `words`, `lines`
    licence: Mapping[str, str] | None = None  # `license`, and for "other" `license_name` and `license_link`; None: not given
    base_model: str | None = None  # owner/name it was made from
    languages: Sequence[str] = ()
    pictures: Mapping[str, str] = field(default_factory=dict)  # file → words below it
    opening: str | None = None  # how texts begin
    needs_bos: bool = False  # whether the one who writes a prompt has to put that token there
    chat: bool = False  # whether the tokenizer has a chat template
    note: str | None = None  # a warning at the top: training that has not ended
    native: bool = False  # the files are a folder of ours (`lm.native`), which `transformers` does not read


def render(card: Card) -> str:
    """The text of `README.md`."""
    sections = (_head, _use, _evaluation, _sameness, _pictures, _made, _licence)
    lines = ["---", _front_matter(card), "---", ""]
    for section in sections:
        lines += section(card)
    return "\n".join(lines)


def check_evaluations(found: Any, where: str) -> dict[str, dict[str, Any]]:
    """The same, if it has the shape that this module describes.

    **Raises:** `ValueError` that names what is wrong, and where.
    """
    if not isinstance(found, Mapping) or not found:
        raise ValueError(f"{where} holds no evaluations: expected an object with a task under each name")
    for task, result in found.items():
        if not isinstance(result, Mapping) or not result.keys() >= _NEEDED:
            raise ValueError(f"{where}: task {task!r} has {_keys(result)}; expected at least 'metric' and 'value'")
        numbers = {name: result[name] for name in ("value", "low", "high", "n") if result.get(name) is not None}
        wrong = {name: value for name, value in numbers.items() if not isinstance(value, int | float) or isinstance(value, bool)}
        if wrong or "value" not in numbers or not isinstance(result["metric"], str):
            raise ValueError(f"{where}: task {task!r} has {wrong or dict(result)}; expected a name as 'metric' and numbers")
    return {task: dict(result) for task, result in found.items()}


def _keys(result: Any) -> str:
    return ", ".join(map(repr, result)) if isinstance(result, Mapping) else repr(result)


# ------------------------------------------------------------------------------------------- front matter


def _front_matter(card: Card) -> str:
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=_identifier(task),
            dataset_name=task,
            metric_type=_identifier(result["metric"]),
            metric_name=result["metric"],
            metric_value=result["value"],
        )
        for task, result in card.evaluations.items()
    ]
    tuned = card.base_model is not None and any(stage["stage"] != GIVEN for stage in card.stages)
    licence: dict[str, Any] = dict(card.licence or {})
    data = ModelCardData(
        **licence,
        language=list(card.languages) or None,
        library_name="zmaj-lm" if card.native else "transformers",
        pipeline_tag="text-generation",
        tags=["jax", "equinox", "zmaj-lm", *(["conversational"] if card.chat else [])],
        base_model=card.base_model,
        base_model_relation="finetune" if tuned else None,
        datasets=_datasets(card.stages) or None,
        model_name=card.name if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def _identifier(words: str) -> str:
    return "-".join("".join(c.lower() if c.isalnum() or c in "._-/" else " " for c in words).split())


def _datasets(stages: Sequence[Stage]) -> list[str]:
    """Data sets of the Hub among the corpora, each once."""
    corpora = [stage.get(kind) or {} for stage in stages for kind in ("corpus", "replay")]
    specs = [part.get("spec", "") for corpus in corpora for part in (corpus, *corpus.get("parts", []))]
    names = ["/".join(spec.removeprefix("hf://").split("/")[:2]) for spec in specs if spec.startswith("hf://") and "," not in spec]
    return list(dict.fromkeys(names))


# ------------------------------------------------------------------------------------------- what it is, how to use it


def _head(card: Card) -> list[str]:
    model, last = card.model, card.stages[-1]
    made = {stage["stage"]: None for stage in card.stages if stage["stage"] != GIVEN}
    origin = card.stages[0]
    words = [f"A language model of {_count(model['parameters'])} parameters in the drawing of {model['model_type']}"]
    if origin["stage"] == GIVEN:
        words.append(f"made from {card.base_model or origin['source']}, whose making is not recorded here")
    if made:
        words.append(f"trained with zmaj-lm ({', '.join(made)})")
    rows = {
        "parameters": f"{model['parameters']:,}, stored as {card.dtype}",
        "layers, width": f"{model['n_layers']}, {model['d_model']:,}",
        "heads": f"{model['n_heads']} ({model.get('n_kv_heads', model['n_heads'])} for keys and values)",
        "MLP width": f"{model['d_ff']:,}" + (f", {model['n_experts']} experts" if "n_experts" in model else ""),
        "vocabulary": f"{model['vocab']:,} tokens",
        "context": f"{model['context']:,} tokens",
        "tokens in the last stage": f"{last['tokens']:,} in {last['steps']:,} steps" if "tokens" in last and "steps" in last else None,
    }
    note = [] if card.note is None else [f"> **{card.note}**", ""]
    return [f"# {card.name}", "", *note, "; ".join(words) + ".", "", *table(("", ""), rows.items()), ""]


def _use(card: Card) -> list[str]:
    place = card.repository or "this folder"
    ours = [
        "```python",
        "import lm",
        "",
        f'model = lm.load_pretrained("{place}")',
        "```",
        "",
        *([] if card.repository is None else ["```sh", f"python -m recipes.sample {place} --prompt 'Once'", "```", ""]),
        *([] if card.opening is None else [card.opening, ""]),
    ]
    if card.native:
        return ["## Use", "", "`transformers` has no model of this drawing. In a checkout of zmaj-lm, as arrays of JAX:", "", *ours]
    if card.chat:
        prompt = ['messages = [{"role": "user", "content": "Hello!"}]']
        prompt += ['ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)']
    else:
        start = "tokenizer.bos_token + " if card.needs_bos else ""
        prompt = [f'ids = tokenizer({start}"Once", return_tensors="pt", add_special_tokens=False)']
    return [
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{place}")',
        f'model = AutoModelForCausalLM.from_pretrained("{place}")',
        *prompt,
        'print(tokenizer.decode(model.generate(ids["input_ids"], attention_mask=ids["attention_mask"], max_new_tokens=50)[0]))',
        "```",
        "",
        "In a checkout of zmaj-lm, as arrays of JAX:",
        "",
        *ours,
    ]


def _evaluation(card: Card) -> list[str]:
    lines = ["## Evaluation", ""]
    if not card.evaluations:
        return [*lines, "Not evaluated.", ""]
    rows = []
    for task, result in card.evaluations.items():
        low, high, n = (result.get(name) for name in ("low", "high", "n"))
        interval = "not known" if low is None or high is None else f"{_score(low, result)} to {_score(high, result)}"
        counted = "not known" if n is None else f"{n:,} {result.get('of', '')}".strip()
        how = ", ".join(
            f"{name.replace('_', ' ')} {_value(value)}"
            for name, value in result.items()
            if name not in _SHOWN and isinstance(value, str | int | float)
        )
        rows.append((task, result["metric"].replace("_", " "), _score(result["value"], result), interval, counted, how))
    lines += [*table(("task", "metric", "value", "95 % interval", "n", "how"), rows), ""]
    found = card.stages[-1].get("results", {})
    coders = [(coder, f"{found[key]:.4f}") for key, coder in YARDSTICKS.items() if key in found]
    if coders:
        lines += ["Bits per byte of general compressors on the same held-out text:", "", *table(("", "bits per byte"), coders), ""]
    return lines


def _sameness(card: Card) -> list[str]:
    """Whether the files are the model, and whether others compute the same."""
    lines = ["## Parity", ""]
    if "read_back_equal" in card.evidence:
        equal = "equal bit for bit" if card.evidence["read_back_equal"] else "NOT EQUAL"
        lines += [f"Read back from these files, its logits are {equal} to those of the model that was written.", ""]
    words = card.evidence.get("words", NOT_COMPARED)
    lines += [f"With other implementations: {words}.", ""]
    return lines + [f"- {line}" for line in card.evidence.get("lines", [])] + ([""] if card.evidence.get("lines") else [])


def _made(card: Card) -> list[str]:
    last = card.stages[-1]
    return [*lineage_section(card.stages), *data_section(last), *settings_section(last)]


def _pictures(card: Card) -> list[str]:
    if not card.pictures:
        return []
    return ["## Curves", "", *(line for file, words in card.pictures.items() for line in (f"![{words}]({file})", ""))]


def _licence(card: Card) -> list[str]:
    if card.licence is None:
        return ["## Licence", "", "No licence given: without one, others have no right to use, change or pass on these weights.", ""]
    name = card.licence.get("license_name", card.licence["license"])
    link = card.licence.get("license_link")
    return ["## Licence", "", f"[{name}]({link})" if link else name, ""]


def _count(parameters: int) -> str:
    return next(f"{parameters / size:.3g}{unit}" for size, unit in ((1e9, "B"), (1e6, "M"), (1, "")) if parameters >= size)


def _score(value: float, result: Mapping[str, Any]) -> str:
    """Shares of items that were right in percent, all else as it is."""
    share = result["metric"].startswith(("accuracy", "exact match", "exact_match")) and 0 <= result["value"] <= 1
    return f"{100 * value:.1f} %" if share else f"{value:.4f}"


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else f"{value}"
