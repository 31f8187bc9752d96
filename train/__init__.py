"""One step, many steps, and what survives them. Checked at run time like `lm` (`JAXTYPING_DISABLE=1` switches it off)."""

from jaxtyping import install_import_hook as _install_import_hook

_install_import_hook(
    ["train.losses", "train.optimizers", "train.step", "train.loop"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)
