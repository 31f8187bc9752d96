"""The least time to a good model, whatever it takes: `recipes.pretrain_small` in our own drawing (`lm.models.zmaj`), each switch a flag.

The loop, the corpus and the report are those of `pretrain_small`, told there from top to bottom. What differs is the drawing: its switches
are known from small models elsewhere, and `recipes.ablate` measures what each is worth here. Those that `transformers` has no model for
make the export a folder of ours (`lm.native`), which `lm.load_pretrained` and every recipe open.

    python -m recipes.speedrun                                              # about ten minutes on 2 CPU cores
    python -m recipes.speedrun --zero-init --mlp relu2 --d-ff 1056 --stream-lambdas
    python -m recipes.speedrun --window 128 --window-pattern SSSL --logit-softcap 15

The defaults are the drawing of `pretrain_small` and a value residual, which is worth more than all else that was measured
(docs/ablations.md); nothing is switched on that was not.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from lm.models.zmaj import ZmajConfig, window_pattern
from recipes import pretrain_small
from recipes.command_line import fail, parse
from recipes.running import ENDS_IN_WORDS

# ------------------------------------------------------------------------------------------- config


class Experiment(pretrain_small.Experiment):
    """The experiment of `pretrain_small` with the switches of our drawing; what each computes stands there."""

    tied: bool = Field(True, description="one matrix for embedding and head")
    qk_norm: bool = Field(True, description="norms on queries and keys, head by head")
    zero_init: bool = Field(False, description="maps that write into the residual stream begin at 0")
    mlp: Literal["gated_silu", "relu2"] = Field("gated_silu", description="SwiGLU, or two matrices and a squared ReLU (take 3/2 of d-ff)")
    embed_norm: bool = Field(False, description="a norm behind the embedding")
    stream_lambdas: bool = Field(False, description="learned weights of the stream and of the embedding where a block begins")
    value_residual: bool = Field(False, description="the first layer's values mixed into those of the others")
    value_embeddings: int = Field(0, ge=0, description="tables of values by token, for the first and the last so many layers")
    logit_scale: float = Field(1.0, gt=0, description="of what the unembedding reads")
    logit_softcap: float | None = Field(None, gt=0, description="logits are bent to ± this; None: taken as they are")
    init_std: float = Field(0.02, gt=0, description="standard deviation of new weights")
    embed_init_std: float | None = Field(None, gt=0, description="of new embeddings and heads; None: init-std")
    window: int | None = Field(None, ge=1, description="tokens that a query of a short layer sees; None: every layer sees all")
    window_pattern: str = Field("SSSL", description="which layers are short (S) and which see all (L), repeated; the last sees all")

    def model_config_of(self, vocab: int) -> ZmajConfig:
        """The drawing at these sizes and switches."""
        switches = ("tied", "qk_norm", "zero_init", "mlp", "embed_norm", "stream_lambdas", "value_residual", "value_embeddings")
        numbers = (
            "d_model",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "d_ff",
            "dropout",
            "logit_scale",
            "logit_softcap",
            "init_std",
            "embed_init_std",
        )
        return ZmajConfig(
            vocab=vocab,
            context=self.seq,
            head_dim=self.d_model // self.n_heads,
            window_by_layer=None if self.window is None else window_pattern(self.window_pattern, self.window, self.n_layers),
            **{name: getattr(self, name) for name in (*numbers, *switches)},
        )


class Config(Experiment):
    """The experiment in sizes for a laptop."""

    preset: Literal["1m", "4m", "14m", "30m", "60m"] = Field("4m", description="sizes of model and batch, as in pretrain_small")
    value_residual: bool = Field(True, description="the first layer's values mixed into those of the others")


PRESETS: dict[str, dict[str, Any]] = pretrain_small.PRESETS

# ------------------------------------------------------------------------------------------- main


def main(config: Experiment) -> Path:
    """The whole experiment. Returns the run folder."""
    return pretrain_small.main(config, "speedrun")


if __name__ == "__main__":
    chosen = parse(Config, __doc__ or "", recipe="speedrun", presets=PRESETS, default_preset="4m")
    try:
        main(chosen)
    except ENDS_IN_WORDS as error:
        fail(str(error))
