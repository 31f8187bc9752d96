"""How a model was made, as sections of its card: the stages, the data and the settings of the last one."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from train.lineage import GIVEN, Stage


def lineage_section(stages: Sequence[Stage]) -> list[str]:
    rows = []
    for number, stage in enumerate(stages, 1):
        results, hours = stage.get("results", {}), stage.get("hours")
        bits = results.get("bits_per_byte", (results.get("after", {}).get("new") or {}).get("bits_per_byte"))
        rows.append(
            (
                f"{number}. {stage['stage']}",
                _corpus_words(stage) if stage["stage"] != GIVEN else f"{stage['source']}: not recorded",
                f"{stage['tokens']:,}" if "tokens" in stage else "",
                f"{stage['steps']:,}" if "steps" in stage else "",
                _machine(stage),
                "" if hours is None else _hours(hours),
                "" if bits is None else f"{bits:.4f}",
            )
        )
    columns = ("stage", "data", "tokens", "steps", "hardware", "hours", "held-out bits per byte")
    return ["## Lineage", "", *table(columns, rows), "", "The whole record of each stage is in `lineage.json`.", ""]


def data_section(stage: Stage) -> list[str]:
    corpus = stage.get("corpus")
    if corpus is None:
        return []
    lines = [f"## Data of the last stage ({stage['stage']})", ""]
    kept = {name: corpus[name] for name in corpus if name not in ("parts", "left_out")} | corpus.get("left_out", {})
    left_out = ("empty", "blank", "invalid", "characters_replaced", "null", "documents_with_nul")
    rows = {
        "text": _corpus_words(stage),
        "training": _amount(corpus, "train"),
        "held out": _amount(corpus, "held_out"),
        "rule": corpus.get("held_out_rule"),
        "left out or changed": ", ".join(f"{n:,} {what.replace('_', ' ')}" for what, n in kept.items() if n and what.startswith(left_out)),
        "replayed": None if not stage.get("replay") else _corpus_words({"corpus": stage["replay"]}),
        "packing": _packing_words(stage.get("packing", {})),
        "tokenizer": _tokenizer_words(stage.get("tokenizer", {})),
        "sha256 of the text": f"`{corpus['sha256']}`" if "sha256" in corpus else None,
    }
    lines += [*table(("", ""), rows.items()), ""]
    if mixture := stage.get("mixture"):
        parts = [
            (name, f"{part['tokens']:,}", f"{part['token_share']:.2%}", f"{part['weight']:.2%}", f"{part['epochs']:.2f}")
            for name, part in mixture.items()
        ]
        lines += ["The mixture as it came out:", "", *table(("part", "tokens", "share", "asked for", "epochs"), parts), ""]
    return lines


def settings_section(stage: Stage) -> list[str]:
    if stage["stage"] == GIVEN:
        return []
    settings = dict(_flat(stage.get("settings", {})))
    versions = ", ".join(f"{name} {value}" for name, value in stage.get("versions", {}).items())
    commit = f" Commit {stage['commit']}." if stage.get("commit") else ""
    speed = stage.get("results", {}).get("tokens_per_s")
    hours = "" if stage.get("hours") is None else f", {_hours(stage['hours'])} hours of training"
    lines = ["## Hyper-parameters of the last stage", "", *table(("setting", "value"), [(n, f"`{v}`") for n, v in settings.items()]), ""]
    lines += [
        f"On {_machine(stage)}{hours}"
        + (f", {speed:,.0f} tokens/s" if speed else "")
        + (f"; {versions}" if versions else "")
        + f".{commit}",
        "",
    ]
    return lines if settings else lines[-2:]


# ------------------------------------------------------------------------------------------- words


def _corpus_words(stage: Mapping[str, Any]) -> str:
    corpus = stage.get("corpus") or {}
    if "python" in corpus:
        return f"the standard library of {corpus['python']}"
    if corpus.get("parts"):
        return "; ".join(f"{part['weight']:.1%} {_corpus_words({'corpus': part})}" for part in corpus["parts"])
    if not corpus and "task" in stage:
        return f"problems of {stage['task']}"
    return f"{corpus.get('spec', 'not recorded')}" + (f" ({corpus['kind'].replace('_', ' ')})" if "kind" in corpus else "")


def _amount(corpus: Mapping[str, Any], part: str) -> str | None:
    documents, size = corpus.get(f"{part}_documents"), corpus.get(f"{part}_bytes")
    return None if documents is None or size is None else f"{documents:,} documents, {size:,} bytes"


def _tokenizer_words(tokenizer: Mapping[str, Any]) -> str:
    words = [f"{tokenizer['vocab']:,} tokens"] if "vocab" in tokenizer else []
    words += (
        [f"{tokenizer['bytes_per_token_held_out']:.2f} bytes a token on held-out text"] if "bytes_per_token_held_out" in tokenizer else []
    )
    return ", ".join([*words, *([f"digest `{tokenizer['digest']}`"] if "digest" in tokenizer else [])])


def _packing_words(packing: Mapping[str, Any]) -> str:
    if "packing" not in packing:
        return "; ".join(f"{name}: {_packing_words(part)}" for name, part in packing.items() if isinstance(part, Mapping))
    cut = f", {packing['documents_cut']:,} documents cut" if "documents_cut" in packing else ""
    return f"{packing['packing']}, {packing.get('fill_fraction', 1):.2%} filled{cut}"


def _machine(stage: Mapping[str, Any]) -> str:
    hardware = stage.get("hardware", {})
    if not hardware:
        return ""
    if hardware.get("platform") == "cpu":
        return f"{hardware.get('cpu', 'CPU')}, {hardware.get('cpu_cores', '?')} cores"
    return f"{hardware.get('device_count', 1)} × {hardware.get('device_kind', hardware.get('platform', 'not recorded'))}"


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 10 else f"{hours:.2g}"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None and value != []:
            yield f"{prefix}{name}", value


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """A Markdown table of the rows that have something to say behind their first cell."""
    told = [[_cell(cell) for cell in row] for row in rows if any(cell not in (None, "") for cell in row[1:])]
    return [_row(head), _row(["---"] * len(head)), *map(_row, told)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    return "" if value is None else " ".join(str(value).split()).replace("|", "\\|")
