"""Rewards learned from preferences: a decoder that gives one number for a text, trained on pairs of which one was preferred.

    RewardModel             a decoder and a head; `values` are the head's numbers at every token
    text_rewards            of these, one a text: that of its last token
    reward_objective        what `train.step.make_step` minimises: Bradley-Terry on pairs of texts
    make_rewards            the rewards of a batch, compiled, to rank answers by
    save_reward_model, load_reward_model

A text is a segment of a row. Rows may hold one text or several: texts are counted in reading order, and the texts 2k and 2k + 1 are the
chosen and the rejected one of a pair.

    one row a text      [chosen 0 . .] [rejected 0 .] [chosen 1 . .] [rejected 1 .]
    packed              [chosen 0 | rejected 0 | .  ] [chosen 1 | rejected 1 | .  ]
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lm.base import AbstractLM, role
from lm.digests import digest
from lm.flight import Flight, put_on_flight
from lm.kernels import Ops
from lm.masks import Facts
from lm.models import load_pretrained, save_pretrained
from train.losses import Loss
from train.optimizers import map_paths
from train.preference import Pairs, bradley_terry
from train.settings import Settings
from train.step import Objective, Told, with_aux

HEAD_FILE = "reward_head.safetensors"
HEAD_KEY = "score.weight"  # (1, d_model), as transformers' …ForSequenceClassification have it
_DIGEST = "base_digest"  # in the file's metadata: of the decoder the head was trained on

# ------------------------------------------------------------------------------------------- the model


class RewardModel(eqx.Module):
    """A decoder whose last hidden states a head turns into numbers (Stiennon et al. 2020, arXiv:2009.01325, section 3.4)."""

    base: AbstractLM
    head: Float[Array, " d_model"]  # fp32

    @staticmethod
    def of(base: AbstractLM) -> "RewardModel":
        """A head of zeros on a decoder: every text is worth 0, and a pair's loss is log 2. The paper draws a small head instead; then texts
        differ before anything has been learned of them."""
        return RewardModel(base, jnp.zeros(base.config.d_model, jnp.float32))

    @property
    def blocks(self) -> tuple[Any, ...]:
        """The decoder's: to put them on flight."""
        return self.base.blocks

    def values(self, hidden: Float[Array, "*batch seq d_model"]) -> Float[Array, "*batch seq"]:
        """The head's number at every token, in fp32. The reward of a text is that of its last token; those before it are not trained.

        **Arguments:**

        - `hidden`: what `base.hidden` gives.
        """
        return jnp.sum(hidden.astype(jnp.float32) * self.head, axis=-1)  # no matrix product: those are TF32 on a GPU

    def trained(self, of_base: Any = None) -> "RewardModel":
        """The same tree with True at what is trained (`train.step.init_state`): the head, and of the decoder what `of_base` has, a tree of
        bools like it; `None`: all but an unembedding of its own, which takes no part in rewards."""
        if of_base is None:
            of_base = map_paths(lambda path, leaf: eqx.is_inexact_array(leaf) and not role(path).startswith("unembed."), self.base)
        return eqx.tree_at(lambda model: (model.base, model.head), self, (of_base, True))


class RewardBatch(NamedTuple):
    """Rows of texts, `[rows, seq]`, int32. To train on, a pair's texts stand in one micro-batch, one behind the other."""

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray  # 1, 2, … for the texts of a row; 0 in padding


def last_tokens(segments: Int[Array, "*batch seq"]) -> Bool[Array, "*batch seq"]:
    """Where a text ends."""
    following = jnp.concatenate([segments[..., 1:], jnp.zeros_like(segments[..., :1])], axis=-1)
    return (segments > 0) & (segments != following)


def text_rewards(
    values: Float[Array, "rows seq"], segments: Int[Array, "rows seq"]
) -> tuple[Float[Array, " places"], Bool[Array, " places"]]:
    """The reward of each text in reading order, and which places have one: shapes cannot tell how many texts there are, so there is an even
    number of places for as many as there could be."""
    ends = last_tokens(segments).reshape(-1)
    places = ends.size + ends.size % 2
    text = jnp.cumsum(ends) - 1  # of each last token; what others have is added as 0
    rewards = jax.ops.segment_sum(jnp.where(ends, values.reshape(-1), 0.0), text, places)
    return rewards, jnp.arange(places) < jnp.sum(ends)


# ------------------------------------------------------------------------------------------- the objective


AnyPairs = Pairs | Float[np.ndarray, " pairs"]


class RewardConfig(Settings):
    """The loss on a pair."""

    margin: float = Field(0.0, ge=0, description="by so much the chosen answer's reward is asked to be larger (Llama 2: 0 to 3)")
    centre: float = Field(
        0.0, ge=0, description="weight of (sum of a pair's rewards) squared, which keeps rewards around 0; TRL's documentation: 0.01"
    )


def pair_losses(config: RewardConfig, chosen: AnyPairs, rejected: AnyPairs) -> Pairs:
    """-log σ(r(y_w) - r(y_l) - m) + λ (r(y_w) + r(y_l))²: Bradley-Terry, whose rewards are fixed but for a constant, and what fixes that
    (Eisenstein et al. 2023, arXiv:2312.09244, eq. 2)."""
    chosen, rejected = jnp.asarray(chosen), jnp.asarray(rejected)
    return bradley_terry(chosen, rejected, config.margin) + config.centre * jnp.square(chosen + rejected)


def pair_metrics(chosen: AnyPairs, rejected: AnyPairs) -> dict[str, Pairs]:
    """What is told of pairs: `accuracy` (1 where the chosen answer's reward is the larger one; equal ones count a half, as a coin would
    decide), `margin` (by how much), `rewards_chosen`, `rewards_rejected`."""
    chosen, rejected = jnp.asarray(chosen), jnp.asarray(rejected)
    margin = chosen - rejected
    return {"accuracy": (jnp.sign(margin) + 1) / 2, "margin": margin, "rewards_chosen": chosen, "rewards_rejected": rejected}


def reward_objective(config: RewardConfig) -> Objective:
    """What a step minimises on a `RewardBatch`: the mean over its pairs. Told beside it: `pair_metrics`, and what the blocks report."""

    def objective(model: RewardModel, batch: RewardBatch, key: Array) -> Told:
        segments = jnp.asarray(batch.segments)
        hidden, _, aux = model.base.hidden(jnp.asarray(batch.tokens), Facts(jnp.asarray(batch.positions), segments), key=key)
        rewards, there = text_rewards(model.values(hidden), segments)
        chosen, rejected, both = rewards[::2], rewards[1::2], there[1::2].astype(jnp.float32)
        pairs = jnp.sum(both)
        total = jnp.sum(pair_losses(config, chosen, rejected) * both)
        told = {name: (jnp.sum(value * both), pairs) for name, value in pair_metrics(chosen, rejected).items()}
        loss = with_aux(Loss(total, jax.lax.stop_gradient(total), pairs), model.base, aux)
        return Told(loss, jax.lax.stop_gradient(aux | told), {})

    return objective


def make_rewards(flight: Flight, ops: Ops) -> Callable[[RewardModel, RewardBatch], Float[np.ndarray, " texts"]]:
    """`rewards(model, batch)`: of all texts in reading order, dropout off. Compiled for each shape of a batch."""

    @eqx.filter_jit
    def compiled(model: RewardModel, batch: RewardBatch) -> tuple[Array, Array]:
        flying = put_on_flight(model, flight, ops)
        tokens, positions, segments = map(jnp.asarray, batch)
        hidden, _, _ = flying.base.hidden(tokens, Facts(positions, segments))
        return text_rewards(flying.values(hidden), segments)

    def rewards(model: RewardModel, batch: RewardBatch) -> np.ndarray:
        found, there = jax.device_get(compiled(model, jax.tree.map(jnp.asarray, batch)))
        return found[there]

    return rewards


# ------------------------------------------------------------------------------------------- on disk


def save_reward_model(model: RewardModel, folder: str | Path, **how: Any) -> None:
    """A folder for `transformers` (`lm.save_pretrained`, which takes `how`) with the head beside. Killed between the two files, it leaves a
    folder that `load_reward_model` refuses: the head knows the weights it belongs to."""
    save_pretrained(model.base, folder, **how)
    write_head(model.head, Path(folder))


def write_head(head: Float[Array, " d_model"], folder: Path) -> None:
    """Write the head beside the decoder that lies in a folder: the file is whole or not there."""
    metadata = {"format": "pt", _DIGEST: _digest(load_pretrained(folder))}  # of what was written, whatever dtype it was written in
    beside = folder / f".{HEAD_FILE}.writing"
    try:
        with beside.open("wb") as file:
            file.write(save({HEAD_KEY: np.asarray(head, np.float32)[None]}, metadata))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(folder / HEAD_FILE)
    finally:
        beside.unlink(missing_ok=True)


def load_reward_model(folder: str | Path, *, dtype: Any = None) -> RewardModel:
    """A reward model from its folder.

    **Arguments:**

    - `dtype`: of the decoder's arrays in memory; `None` keeps the file's. The head is fp32.

    **Raises:** `FileNotFoundError` for a model without a head; `ValueError` for a head that is cut short, has another width, or was trained
    on other weights; and as `lm.load_pretrained` does.
    """
    file = Path(folder) / HEAD_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist: expected the folder of a reward model, a language model with a head beside it. Train one with "
            f"python -m recipes.reward_model {folder}"
        )
    head, of = _read_head(file)
    base = load_pretrained(folder)
    if head.shape != (1, base.config.d_model):
        raise ValueError(f"{HEAD_KEY} in {file} has shape {head.shape}; the model beside it has a width of {base.config.d_model}")
    if of is not None and of != _digest(base):
        raise ValueError(
            f"the head in {file} was trained on other weights than those beside it (digest {of[:12]}, here {_digest(base)[:12]}): "
            "copy the whole folder anew, or train the head again"
        )
    if dtype is not None:
        base = jax.tree.map(lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, base)
    return RewardModel(base, jnp.asarray(head[0], jnp.float32))


def _read_head(file: Path) -> tuple[np.ndarray, str | None]:
    """The tensor, and the digest of the decoder it belongs to where the file has it."""
    try:
        with safe_open(file, framework="np") as tensors:
            if HEAD_KEY not in tensors.keys():  # noqa: SIM118
                raise ValueError(f"{file} holds {', '.join(tensors.keys()) or 'nothing'}; expected {HEAD_KEY}")
            return np.asarray(tensors.get_tensor(HEAD_KEY)), (tensors.metadata() or {}).get(_DIGEST)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}): was the download or copy cut short?") from error


def _digest(base: AbstractLM) -> str:
    return digest(eqx.filter(base, eqx.is_array))
