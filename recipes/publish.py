"""Publish a model with evidence: write it, prove that it is the same, measure it, describe it, and send it to the Hub.

In this order, and each step said:

1. The model is taken from a run, a Hugging Face folder, a GGUF file or the Hub, and written as a folder that `transformers` loads.
2. It is read back: its logits must be those of the model that was written, bit for bit. Then `transformers` computes them from the same
   files, here or in the interpreter that `--parity-python` names. Where there is none the card says `not compared`.
3. The model as read back is measured on the run's held-out text; scores of `recipes.evaluate` come with `--eval`.
4. The card is written from the run's record and those of the stages before it.
5. The folder goes to the Hub as one commit. What is cut off goes on with the same command.

    python -m recipes.publish runs/pretrain_small-DATE-TIME --to mine/                              # only the folder
    python -m recipes.publish runs/pretrain_small-DATE-TIME --repo me/mine --license mit --dry-run  # and what would be sent
    python -m recipes.publish runs/pretrain_small-DATE-TIME --repo me/mine --license mit --private

The token is that of `hf auth login` or HF_TOKEN: it is no flag, so that it stands in no history and no list of processes. HF_ENDPOINT names
another Hub. A comparison that fails ends with status 1, and nothing is sent.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro
from huggingface_hub.utils import validate_repo_id
from loguru import logger
from pydantic import Field, model_validator
from rich.console import Console
from rich.table import Table

from lm.base import AbstractLM
from lm.hub import folder_of
from lm.native import is_native
from recipes.command_line import RecipeConfig, fail
from recipes.convert import bring_in
from recipes.evidence import prove
from recipes.loading import exported_step, is_gguf, is_run, newest_step
from recipes.running import ENDS_IN_WORDS
from train.card import Card, check_evaluations
from train.hub import open_hub
from train.lineage import Stage, lineage, record_of, stages_behind
from train.logs import plain_messages
from train.parity import can_compare
from train.publish import EVIDENCE_FILE, building, card_of, files_of, finish, in_dtype, leaks, run_evaluations, write_model
from train.push import check_free, lfs_expected, push
from train.runtime import compilation_cache

CAPTIONS = {
    "loss": "Loss on training and held-out text",
    "forgetting": "What was learned and what was forgotten",
    "update_ratios": "How far each kind of weight moves in a step",
}


class Config(RecipeConfig):
    """What to publish, where to, and what is said of it."""

    source: Annotated[str, tyro.conf.Positional] = Field(description="run, Hugging Face folder, .gguf file, or owner/name on the Hub")
    repo: str | None = Field(None, description="repository on the Hub: owner/name, or a name of your own; None: only the folder is written")
    to: Path | None = Field(None, description="folder to write; None: runs/publish-NAME")
    dry_run: bool = Field(False, description="write the folder, show every file with its size, and send nothing")

    dtype: Literal["keep", "float32", "bfloat16", "float16"] = Field("keep", description="of the tensors written; keep: as they are")
    from_revision: str | None = Field(None, description="branch, tag or commit of a SOURCE on the Hub; None: main")
    parity_python: Path | None = Field(None, description="interpreter with torch and transformers to compare with; None: this one")
    places: int = Field(128, ge=2, description="tokens on which logits are compared, at most")
    measure: bool = Field(True, description="measure the run's held-out text again, with the model as read back")
    eval: tuple[Path, ...] = Field((), description="results.json files of recipes.evaluate, for the card's table")

    license: str | None = Field(
        None, description="of the weights, as the Hub names it: apache-2.0, mit, ..., other; none: no licence given"
    )
    license_name: str | None = Field(None, description="name of a licence that is other")
    license_link: str | None = Field(None, description="address of its text")
    base_model: str | None = Field(None, description="owner/name on the Hub of what it was made from; None: as the lineage says")
    language: tuple[str, ...] = Field((), description="of the text, by ISO 639 code: en de; code for programs")

    private: bool = Field(False, description="a repository that is made is seen by you alone")
    revision: str = Field("main", description="branch to send to; made from main if it is not there")
    message: str | None = Field(None, description="of the commit; None: what the model is")
    overwrite: bool = Field(False, description="take over a repository that holds other things; its history keeps them")

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        if self.repo is None and self.to is None:
            raise ValueError("nothing to do: say --repo to send it to the Hub, or --to to write a folder alone")
        if self.repo is not None:
            validate_repo_id(self.repo)
            if self.license is None:
                raise ValueError("--repo needs --license, as in --license apache-2.0; --license none publishes without one, which is said")
        if (self.license == "other") != (self.license_name is not None and self.license_link is not None):
            raise ValueError("--license other needs --license-name and --license-link, and no other licence takes them")
        return self


# ------------------------------------------------------------------------------------------- main


def main(config: Config) -> bool:
    """All five steps. Whether everything that was compared passed."""
    plain_messages()
    compilation_cache()

    # What would only come out after minutes.
    folder = config.to or Path("runs") / f"publish-{(config.repo or '').split('/')[-1]}"
    check_folder(folder)
    can_compare(config.parity_python)
    scores = given_scores(config.eval)
    hub = None if config.repo is None or config.dry_run else open_hub()
    repository = config.repo if hub is None or config.repo is None else hub.full_name(config.repo)
    if hub is not None and repository is not None and not config.overwrite:
        check_free(repository, hub, revision=config.revision)

    # The model, and where it comes from.
    model, tokenizer, origin = bring_in(config.source, config.from_revision)
    model = model if config.dtype == "keep" else in_dtype(model, config.dtype)
    logger.info(f"{origin}: {model.config.model_type}, {model.n_params:,} parameters")
    if tokenizer is None:
        logger.warning(f"{config.source} has no tokenizer that we can read: the folder gets none, and no text can be measured")
    stages, note, own = history(config, origin)

    # The folder: model, proof, card.
    with building(folder) as beside:
        write_model(model, tokenizer, beside)
        keep_generation_settings(config.source, config.from_revision, beside)
        asked: dict[str, Any] = {"places": config.places, "python": config.parity_python, "measure": config.measure}
        evidence = prove(model, tokenizer, beside, source=config.source, earlier=folder, **asked)
        pictures = copy_pictures(Path(config.source), beside)
        card = card_of(
            (repository or folder.resolve().name).split("/")[-1],
            model,
            tokenizer,
            dtypes(model),
            stages,
            own | evidence["measured"] | scores,
            repository=repository,
            evidence=evidence,
            licence=licence(config),
            base_model=config.base_model or base_of(stages),
            languages=config.language,
            pictures=pictures,
            note=note,
            native=is_native(beside),
        )
        finish(beside, card, evidence)
    show(folder, card)

    # Nothing of this machine, no model that is another, and off it goes.
    places = [Path.cwd(), folder.resolve(), *([Path(config.source).resolve()] if Path(config.source).exists() else [])]
    if found := leaks(folder, [], [Path.home(), *places]):
        raise ValueError(f"{folder} holds what is of this machine alone:\n  " + "\n  ".join(found))
    if not evidence["passed"]:
        logger.error("it is not the same model: nothing is sent. The folder stays, to be looked at")
        return False
    if config.repo is None or repository is None:
        return True
    if hub is None:
        show_files(config, folder, repository)
        return True
    message = config.message or f"Publish {card.name}: {model.config.model_type}, {model.n_params:,} parameters"
    how: dict[str, Any] = {"private": config.private, "revision": config.revision, "overwrite": config.overwrite}
    pushed = push(folder, repository, hub, message=message, places=places, **how)
    logger.info(f"{'sent' if pushed.changed else 'nothing new to send: the repository holds these very files'}: commit {pushed.commit}")
    print(pushed.url)
    return True


def check_folder(folder: Path) -> None:
    """**Raises:** `ValueError` for a folder that would be written over and holds something else."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / EVIDENCE_FILE).is_file()):
        raise ValueError(f"{folder} holds other things, not written from here: choose another folder with --to")


def given_scores(files: tuple[Path, ...]) -> dict[str, dict[str, Any]]:
    """The scores of all files, by task."""
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        try:
            new = check_evaluations(json.loads(file.read_text(encoding="utf-8")), f"{file}")
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is not JSON ({error}): expected a results.json of recipes.evaluate") from None
        if twice := sorted(found.keys() & new.keys()):
            raise ValueError(f"{file}: {', '.join(twice)} came with an earlier --eval already")
        found |= new
    return found


# ------------------------------------------------------------------------------------------- where it comes from


def history(config: Config, origin: str) -> tuple[list[Stage], str | None, dict[str, dict[str, Any]]]:
    """The stages, a warning for the card where the last one has not ended, and what that one measured itself."""
    run = Path(config.source)
    if not is_run(run) or not (run / "manifest.json").is_file():
        return stages_behind(config.source, revision=config.from_revision), None, {}
    manifest, results = record_of(run)
    if not (run / "checkpoints").is_dir() or exported_step(run) == newest_step(run):
        return stages_behind(config.source), None, run_evaluations(results)
    note = f"Training has not ended: step {newest_step(run)} of {manifest['steps']}."
    logger.warning(f"{origin}: {note}")
    return lineage(manifest, {}), note, {}


def base_of(stages: list[Stage]) -> str | None:
    """The repository that the lineage begins with, if it begins with one."""
    source = stages[0].get("source", "")
    return source if "/" in source else None


def licence(config: Config) -> dict[str, str] | None:
    if config.license in (None, "none"):
        return None
    named = {"license": config.license, "license_name": config.license_name, "license_link": config.license_link}
    return {name: value for name, value in named.items() if value is not None}


def keep_generation_settings(source: str, revision: str | None, folder: Path) -> None:
    """A model that came with settings of its own for generating keeps them."""
    if is_gguf(source) or is_run(source):
        return
    theirs = folder_of(source, revision) / "generation_config.json"
    if theirs.is_file():
        shutil.copy(theirs, folder / theirs.name)


def copy_pictures(source: Path, folder: Path) -> dict[str, str]:
    """The run's pictures, those we have words for first, with the words to stand below each."""
    found = {file.stem: file for file in sorted(source.glob("*.png"))}
    stems = [*(stem for stem in CAPTIONS if stem in found), *(stem for stem in found if stem not in CAPTIONS)]
    for stem in stems:
        shutil.copy(found[stem], folder / f"{stem}.png")
    return {f"{stem}.png": CAPTIONS.get(stem, stem.replace("_", " ")) for stem in stems}


def dtypes(model: AbstractLM) -> str:
    return " and ".join(sorted({f"{leaf.dtype}" for leaf in jax.tree.leaves(model)}))


# ------------------------------------------------------------------------------------------- what is said


def show(folder: Path, card: Card) -> None:
    """The scores, and where to read on."""
    for task, result in card.evaluations.items():
        interval = "" if result.get("low") is None else f" (95 %: {result['low']:.4f} to {result['high']:.4f})"
        logger.info(f"{task}: {result['metric']} {result['value']:.4f}{interval}")
    logger.info(f"licence: {'none given' if card.licence is None else card.licence['license']}")
    logger.info(f"written {folder}, {len(files_of(folder))} files; read {folder / 'README.md'}")


def show_files(config: Config, folder: Path, repository: str) -> None:
    """What a push would send."""
    table = Table("file", "bytes", "kept as")
    table.columns[1].justify = "right"
    sizes = {name: (folder / name).stat().st_size for name in files_of(folder)}
    for name, size in sizes.items():
        table.add_row(name, f"{size:,}", "large file (LFS)" if lfs_expected(folder / name) else "text in the commit")
    table.add_section()
    table.add_row("all", f"{sum(sizes.values()):,}", "")
    console = Console()
    console.print(table)
    made = f"which is made, {'private' if config.private else 'public'}, if it is not there"
    console.print(
        "dry run: nothing was sent, and the Hub was not asked; what is kept as a large file it decides itself. "
        f"Without --dry-run these go to {repository}, branch {config.revision}, {made}.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    chosen = tyro.cli(Config, description=__doc__, prog="python -m recipes.publish")
    try:
        passed = main(chosen)
    except ENDS_IN_WORDS as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("stopped. What arrived at the Hub stays there; run the same command again to go on")
    sys.exit(0 if passed else 1)
