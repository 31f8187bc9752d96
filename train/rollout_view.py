"""Answers, looked at: what each token was worth, how likely and how open it was. In the terminal, as HTML, as JSONL, and the curves of a
run."""

import html
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Group
from rich.style import Style
from rich.text import Text

from train.groups import Judged
from train.logs import read_metrics

KEPT = 3  # best and as many worst answers of a step


@dataclass(frozen=True)
class Seen:
    """One answer with its numbers, a column a token; NaN where a token was not drawn (the prompt, a tool's reply)."""

    words: str  # of the whole answer: reward, advantage, how it ended
    tokens: list[str]
    log_probs: np.ndarray
    entropies: np.ndarray
    advantages: np.ndarray

    @property
    def rows(self) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """(name, numbers, the same between -1 and 1 for the colour)."""
        worst = max(1e-9, float(np.nanmax(np.abs(self.advantages), initial=0.0)))
        return [
            ("log p", self.log_probs, np.clip(self.log_probs / 5, -1, 0)),  # red where it was unlikely
            ("entropy", self.entropies, -np.clip(self.entropies / 2, 0, 1)),  # red where much else was possible
            ("advantage", self.advantages, self.advantages / worst),  # green pulled up, red pushed down
        ]


def seen(judged: Judged, advantages: np.ndarray, row: int, readable: Callable[[np.ndarray], list[str]]) -> Seen:
    """**Arguments:**

    - `advantages`: `[rows]`.
    - `readable`: the text of each token.
    """
    rollouts, length = judged.rollouts, judged.rollouts.length_of(row)
    prompt = rollouts.prompt_of(row)
    drawn = rollouts.drawn[row, :length]

    def column(values: np.ndarray) -> np.ndarray:
        return np.concatenate([np.full(len(prompt), np.nan), np.where(drawn, values, np.nan)])

    ending = "ended" if rollouts.ended[row] else "cut off"
    words = f"reward {judged.rewards[row]:g}, advantage {advantages[row]:+.3f}, {length} tokens, {ending}"
    tokens = readable(prompt) + readable(rollouts.tokens[row, :length])
    numbers = column(rollouts.log_probs[row, :length]), column(rollouts.entropies[row, :length]), column(np.full(length, advantages[row]))
    return Seen(words, tokens, *numbers)


def extremes(judged: Judged, kept: int = KEPT) -> tuple[list[int], list[int]]:
    """Rows of the best and of the worst answers, of different prompts as far as there are, without those left out."""
    order = [int(row) for row in np.argsort(judged.rewards, kind="stable") if not np.isnan(judged.rewards[row])]

    def first(rows: Sequence[int]) -> list[int]:
        by_prompt: dict[int, int] = {}
        for row in rows:
            by_prompt.setdefault(row // judged.rollouts.n, row)
        return [*by_prompt.values()][:kept]

    return first(order[::-1]), first(order)


def keep_rollouts(folder: Path, step: int, judged: Judged, advantages: np.ndarray, readable: Callable[[np.ndarray], list[str]]) -> Group:
    """Write the best and the worst answers of a step to `rollouts.jsonl`, a line each, and to `rollouts/step-N.html`. Returns them for the
    terminal."""
    best, worst = extremes(judged)
    shown = [(kind, seen(judged, advantages, row, readable)) for kind, rows in (("best", best), ("worst", worst)) for row in rows]
    path = folder / "rollouts.jsonl"
    earlier = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    lines = [line for line in earlier if json.loads(line)["step"] < step]  # a resumed run writes its own again
    for kind, one in shown:
        numbers = {name: [None if np.isnan(x) else round(float(x), 6) for x in values] for name, values, _ in one.rows}
        lines.append(json.dumps({"step": step, "kind": kind, "what": one.words, "tokens": one.tokens, **numbers}, ensure_ascii=False))
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    beside.replace(path)
    page = folder / "rollouts" / f"step-{step:06d}.html"
    page.parent.mkdir(exist_ok=True)
    page.write_text(as_html([(f"{kind}: {one.words}", one) for kind, one in shown], title=f"answers of step {step}"), encoding="utf-8")
    return Group(*(as_text(one, kind) for kind, one in shown))


# ------------------------------------------------------------------------------------------- terminal and page


def as_text(one: Seen, title: str) -> Text:
    """Three lines of colour over the tokens, for a terminal."""
    lines = Text(f"{title}: {one.words}\n", style="bold")
    for name, values, shades in one.rows:
        lines.append(f"{name:>10} ", style="dim")
        for token, value, shade in zip(one.tokens, values, shades, strict=True):
            shown = token.replace("\n", "⏎")
            lines.append(shown, style=Style(dim=True) if np.isnan(value) else Style(color="black", bgcolor=_rgb(shade)))
        lines.append("\n")
    return lines


def as_html(answers: Sequence[tuple[str, Seen]], *, title: str) -> str:
    """A page of its own: a block an answer, three lines each; the number of a token shows where the pointer rests on it."""
    parts = [
        f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title>",
        "<style>body{font:14px monospace;margin:2em;background:#fff;color:#000}div{margin:.2em 0;white-space:pre-wrap}"
        "b{display:inline-block;width:7em;font-weight:normal;color:#777}i{color:#999;font-style:normal}"
        "h2{font-size:1em;margin:1.6em 0 .4em}span{padding:.1em 0}</style>",
        f"<h1>{html.escape(title)}</h1><p>log p and entropy in nats, red where unlikely and where much else was possible; advantage green "
        "where the token is made likelier. Grey: read, not drawn.</p>",
    ]
    for words, one in answers:
        parts.append(f"<h2>{html.escape(words)}</h2>")
        for name, values, shades in one.rows:
            cells = []
            for token, value, shade in zip(one.tokens, values, shades, strict=True):
                shown = html.escape(token.replace("\n", "⏎"))
                coloured = f"<span style='background:{_rgb(shade)}' title='{name} {value:.4f}'>{shown}</span>"
                cells.append(f"<i>{shown}</i>" if np.isnan(value) else coloured)
            parts.append(f"<div><b>{name}</b>{''.join(cells)}</div>")
    return "\n".join(parts) + "\n"


def _rgb(shade: float) -> str:
    """-1 red, 0 white, 1 green."""
    if np.isnan(shade):
        return "#ffffff"
    fade = round(255 * (1 - 0.6 * min(1.0, abs(float(shade)))))
    return f"#ff{fade:02x}{fade:02x}" if shade < 0 else f"#{fade:02x}ff{fade:02x}"


# ------------------------------------------------------------------------------------------- curves


def draw_learning(folder: str | os.PathLike[str], *, title: str) -> Path:
    """pass@1 on held-out problems over the minutes, of imitation, RL and control; below, the reward and the entropy of RL's answers. Reads
    `warm.jsonl`, `metrics.jsonl` and `control.jsonl`, writes `learning.png`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder = Path(folder)
    told = {
        name: read_metrics(folder / f"{name}.jsonl") if (folder / f"{name}.jsonl").is_file() else []
        for name in ("warm", "metrics", "control")
    }
    begin = max((line["minutes"] for line in told["warm"]), default=0.0)
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 5.6), height_ratios=[2, 1], layout="constrained")
    for name, label, colour, offset in (
        ("warm", "imitation", "tab:gray", 0.0),
        ("metrics", "rewards", "tab:blue", begin),
        ("control", "more imitation", "tab:orange", begin),
    ):
        looks = [line for line in told[name] if "pass@1" in line]
        if looks:
            minutes = [offset + line["minutes"] for line in looks]
            shares = [100 * line["pass@1"] for line in looks]
            few = "o" if len(looks) <= 12 else None  # a line alone would look as if it had been measured all along
            above.plot(minutes, shares, marker=few, color=colour, label=f"{label}, now {shares[-1]:.1f}%")
            bounds = [[100 * line[f"pass@1_{end}"] for line in looks] for end in ("low", "high")]
            above.fill_between(minutes, *bounds, color=colour, alpha=0.2, linewidth=0)
    steps = [line for line in told["metrics"] if "reward" in line]
    minutes = [begin + line["minutes"] for line in steps]
    below.plot(minutes, [line["reward"] for line in steps], color="tab:blue", linewidth=0.9, label="mean reward")
    below.plot(minutes, [line["entropy"] for line in steps], color="tab:red", linewidth=0.9, label="entropy (nats a token)")
    above.set(ylabel="held-out pass@1 (%)", title=title, ylim=(0, 100))
    below.set(xlabel="minutes")
    for axes in (above, below):
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path = folder / "learning.png"
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return path
