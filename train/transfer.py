"""How settings go along with the width of a model, so that those found on a narrow one serve a wide one. All rules are here.

    rule        learning rate of all   of matrices beside     their new weights   embedding, head, norms   logits
    constant    as it is               as they are            as they are         as they are              as they are
    mup         as it is               x (base/width)^p       std x √(base/width) as they are              x base/width
    power       x (base/width)^p       as they are            as they are         as they are              as they are

`mup` is that of Yang et al. 2022 (arXiv:2203.03466, table 8): every part moves the stream by as much at any width. p follows from how large
an optimizer's update is as a map (Yang et al. 2023, arXiv:2310.17813, condition 1: its spectral norm should be √(out/in), so constant for
matrices that grow on both sides). AdamW's entries keep their size, and in the worst case they add up: the norm goes with the width, p = 1.
Muon's singular values are alike, and at a root mean square of 0.2 they are 0.2 √max(out, in): p = 1/2.

`power` is what the best learning rates under `constant` ask for. From width 32 to 256 (`recipes.scaling --part widths`) it comes to fewer
bits per byte than `mup` at every width above the base (docs/ablations.md), so the presets of `recipes.pretrain_small` follow it.
"""

from typing import Any, Literal, NamedTuple

RuleName = Literal["constant", "mup", "power"]
EXPONENTS = {"adamw": 1.0, "lion": 1.0, "adafactor": 1.0, "schedule_free": 1.0, "soap": 1.0, "muon": 0.5, "normuon": 0.5}
POWER = 0.71  # measured, for Muon with the embedding at ten times its rate
MATRICES = ("attn.*_proj.weight", "mlp.*.weight")  # roles of the maps inside blocks


class PowerLaw(NamedTuple):
    """A value at one size, and the power of the size that it goes with."""

    value: float
    size: float
    power: float

    def at(self, size: float) -> float:
        return self.value * (size / self.size) ** self.power


# Of the width: the peak learning rate of Muon in pretrain_small.
PEAK = PowerLaw(5e-3, 256, -POWER)


def peak_at(width: int) -> float:
    """The same to two digits, as the presets have it."""
    return float(f"{PEAK.at(width):.2g}")


class Transfer(NamedTuple):
    """What a rule makes of settings found at the base's width."""

    rate: float  # factor on the learning rate of matrices
    std: float  # factor on the standard deviation of their new weights
    logits: float  # factor on the logits
    decay: float  # factor on the weight decay of matrices
    all: float = 1.0  # factor on every learning rate, that of matrices too


def transferred(rule: RuleName, optimizer: str, width: int, base: int, exponent: float | None = None) -> Transfer:
    """The factors at a width.

    **Arguments:**

    - `exponent`: p, where it was measured; `None`: under `mup` that of the optimizer, under `power` `POWER`.

    Weight decay is multiplied with the learning rate at each step, so it grows as that falls: what a matrix forgets over a run stays the
    same (Wang and Aitchison 2024, arXiv:2405.13698).
    """
    if rule == "constant":
        return Transfer(1.0, 1.0, 1.0, 1.0)
    ratio = base / width
    if rule == "power":
        return Transfer(1.0, 1.0, 1.0, 1.0, ratio ** (POWER if exponent is None else exponent))
    rate = ratio ** (EXPONENTS[optimizer] if exponent is None else exponent)
    return Transfer(rate, ratio**0.5, ratio, 1 / rate)


def changes(found: Transfer, *, init_std: float, weight_decay: float) -> dict[str, Any]:
    """The same as changes to an experiment of `recipes.speedrun` whose base has these values; `all` goes on its peak learning rate."""
    return {
        "init_std": init_std * found.std,
        "embed_init_std": init_std,
        "logit_scale": found.logits,
        "optimizer": {"learning_rate_of": dict.fromkeys(MATRICES, found.rate), "weight_decay": weight_decay * found.decay},
    }
