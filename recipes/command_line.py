"""From the command line to a checked config, and back from a saved one.

Every field of a recipe's `Config` is a flag; `--help` shows its meaning, unit and default. Defaults < preset < flags. With `--resume` the
saved config of the run takes the place of the defaults, and only fields marked `resumable` may differ from it. With `--config FILE` a saved
config takes that place in a new run, which then is the same run once more.
"""

import argparse
import fcntl
import json
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import tyro
from loguru import logger
from pydantic import BaseModel, Field, ValidationError

from train.loop import SpikeError
from train.settings import in_words

CONFIG_FILE = "config.json"

AnyConfig = TypeVar("AnyConfig", bound=BaseModel)


class RecipeConfig(BaseModel, frozen=True, extra="forbid"):
    """A config whose mistakes read as sentences that name the flags."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(in_words(error, _as_flag)) from None


def resumable(default: Any, **options: Any) -> Any:
    """A pydantic field that may differ when a run is resumed: it changes how the run is carried out, or how far, but not what it is."""
    return Field(default, json_schema_extra={"resumable": True}, **options)


def parse(
    kind: type[AnyConfig],
    description: str,
    *,
    recipe: str,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    default_preset: str = "",
    argv: Sequence[str] | None = None,
) -> AnyConfig:
    """The config the user asked for; on a mistake, words on stderr and exit status 2.

    **Arguments:**

    - `kind`: the recipe's `Config`. It has the fields `run_dir`, `resume`, and `preset` where there are presets.
    - `presets`: values of fields by preset name.
    - `recipe`: the name of its module; run folders made without `--run-dir` begin with it.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first_look.add_argument("--preset")
    first_look.add_argument("--run-dir", "--run_dir")
    first_look.add_argument("--resume", action="store_true")
    file_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    file_look.add_argument("--config", type=Path)
    try:
        seen, _ = first_look.parse_known_args(argv)
    except SystemExit:
        seen = argparse.Namespace(preset=None, run_dir=None, resume=False)  # `--preset` without a name: tyro says it better
    named, argv = file_look.parse_known_args(argv)
    description += "\n\n--config FILE takes the config.json of another run in place of the defaults; flags win over it."
    options: dict[str, Any] = {"description": description, "prog": f"python -m recipes.{recipe}"}
    try:
        if not seen.resume or "--help" in argv or "-h" in argv:
            if named.config is not None:
                if seen.preset:
                    raise ValueError(f"--config {named.config} already says every setting: leave out --preset {seen.preset}")
                options["default"] = read_config(kind, named.config)
            elif presets:
                preset = presets.get(seen.preset or default_preset, {})
                options["default"] = kind(preset=seen.preset or default_preset, **preset) if seen.preset in {None, *presets} else kind()
            return tyro.cli(kind, args=argv, **options)
        if named.config is not None:
            raise ValueError(f"--resume goes on with the run's own settings: leave out --config {named.config}")
        folder = Path(seen.run_dir) if seen.run_dir else latest_run(Path("runs"), recipe)
        saved = load_config(kind, folder).model_copy(update={"resume": True, "run_dir": folder})
        wanted = tyro.cli(kind, args=argv, default=saved, **options)
        check_resumed(saved, wanted)
        return wanted
    except ValidationError as error:
        fail(in_words(error, _as_flag))
    except (ValueError, FileNotFoundError) as error:
        fail(str(error))


def fail(words: str) -> NoReturn:
    """Say what is wrong and leave with status 2, as command-line parsers do."""
    print(f"error: {words}", file=sys.stderr)
    raise SystemExit(2)


def load_config(kind: type[AnyConfig], folder: Path) -> AnyConfig:
    """The config a run was started with."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {folder} is no run that could be resumed. Leave out --resume to start one there")
    return read_config(kind, path)


def read_config(kind: type[AnyConfig], path: Path) -> AnyConfig:
    """A saved config.

    **Raises:** `FileNotFoundError`; `ValueError` that names the file and, a line each, what this recipe does not know or misses in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a config.json that a run has written")
    try:
        return kind.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): expected a config.json that a run has written") from None
    except ValidationError as error:
        raise ValueError(f"{path} is not a config of this recipe as it is now:\n{in_words(error, _as_flag)}") from None


def latest_run(root: Path, recipe: str) -> Path:
    """The run started last, of those that still have a config."""
    runs = sorted(path.parent for path in root.glob(f"{recipe}-*/{CONFIG_FILE}"))
    if not runs:
        raise FileNotFoundError(f"no run of {recipe} in {root}/ to resume: name one with --run-dir DIR, or leave out --resume")
    return runs[-1]


@contextmanager
def claimed(folder: Path, recipe: str) -> Iterator[None]:
    """Have the run folder for this process alone, and leave it in words: inside, Ctrl-C and SIGTERM end the process with how to go on.

    **Raises:** `ValueError` if another process is at work there.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; a run needs a folder")
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however it ends
    except BlockingIOError:
        raise ValueError(f"another process is at work in {folder}: wait for it, or choose another --run-dir") from None
    status = 128 + signal.SIGINT

    def terminate(number: int, frame: Any) -> NoReturn:
        nonlocal status
        status = 128 + number
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt:
        begun = (folder / CONFIG_FILE).exists()
        logger.warning(f"stopped. Go on with:\n  {how_to_resume(folder, recipe)}" if begun else "stopped before anything was begun")
        raise SystemExit(status) from None
    except SpikeError as error:
        go_on = f"{how_to_resume(folder, recipe)} --step.on-spike skip"
        raise SpikeError(f"{error}\nGo on from the last checkpoint, leaving such steps out:\n  {go_on}") from None
    finally:
        signal.signal(signal.SIGTERM, before)
        lock.close()


def how_to_resume(folder: Path, recipe: str) -> str:
    return f"python -m recipes.{recipe} --resume --run-dir {folder}"


def check_resumed(saved: BaseModel, wanted: BaseModel) -> None:
    """Refuse to go on with another experiment under the old one's name."""
    fixed = [
        f"  --{_flag(path)}: the run has {old!r}, asked for is {new!r}"
        for path, old, new, may_differ in _differences(saved, wanted)
        if not may_differ
    ]
    if fixed:
        raise ValueError(
            "a resumed run must be the same experiment; these differ:\n"
            + "\n".join(fixed)
            + f"\nLeave them out, or start a new run. May differ: {', '.join(sorted(_resumable_flags(type(saved))))}"
        )


def _differences(
    saved: BaseModel, wanted: BaseModel, prefix: tuple[str, ...] = (), inherited: bool = False
) -> Iterator[tuple[tuple[str, ...], Any, Any, bool]]:
    for name, field in type(saved).model_fields.items():
        extra = field.json_schema_extra
        may_differ = inherited or (isinstance(extra, dict) and bool(extra.get("resumable")))
        old, new = getattr(saved, name), getattr(wanted, name)
        if isinstance(old, BaseModel):
            yield from _differences(old, new, (*prefix, name), may_differ)
        elif old != new:
            yield (*prefix, name), old, new, may_differ


def _resumable_flags(kind: type[BaseModel], prefix: tuple[str, ...] = ()) -> list[str]:
    found = []
    for name, field in kind.model_fields.items():
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("resumable"):
            found.append(f"--{_flag((*prefix, name))}")
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += _resumable_flags(field.annotation, (*prefix, name))
    return found


def _as_flag(path: Sequence[Any]) -> str:
    return f"--{_flag(path)}"


def _flag(path: Sequence[Any]) -> str:
    return ".".join(str(part).replace("_", "-") for part in path)
