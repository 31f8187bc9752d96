"""Where a model comes from: the stages it went through, oldest first, in a file that travels with its weights.

A stage is one run: the recipe, what it began with, its data, settings, machine, hours and figures, taken from the run's `manifest.json` and
`results.json`. `lineage.json` beside the weights of an export is the list of them. Whoever goes on with a model takes that list along
(`continued_from`, for the key of that name in the new run's manifest) and the export of the new run appends its own stage (`lineage`). A
model that came without the file begins its lineage with a stage named `given`: no more is known of it than a name and a digest.

Nothing in it says where on a machine anything lay: `public` shortens paths to names.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm.hub import REPOSITORY, folder_of

LINEAGE_FILE = "lineage.json"
GIVEN = "given"

Stage = dict[str, Any]

_MANIFEST = ("corpus", "replay", "tokenizer", "packing", "mixture", "model", "steps", "tokens", "seed")
_KNOWN = {*_MANIFEST, "continued_from", "sessions"}
_DEVICE = ("platform", "device_kind", "cpu", "cpu_cores", "device_count", "process_count", "memory_bytes")
_VERSIONS = ("python", "jax", "jaxlib", "equinox", "optax", "grain", "numpy")
_PATH = re.compile(r"(?:[A-Za-z][\w+.-]*://)?(?:~|[^\s,:='\"()\[\]]*)/[^\s,:='\"()\[\]]*")


def continued_from(source: str | Path, digest: str, *, revision: str | None = None) -> dict[str, Any]:
    """What a run's manifest keeps under `continued_from`: the source's name, the digest of its weights, and the stages behind them.

    **Arguments:**

    - `source`: as given to `recipes.loading.load`: a run, a folder, a GGUF file, or `owner/name` on the Hub.
    - `digest`: of the weights the run begins with (`train.checkpoint.digest`).
    """
    return {"source": name_of(source), "digest": digest, "lineage": stages_behind(source, revision=revision)}


def lineage(manifest: Mapping[str, Any], results: Mapping[str, Any]) -> list[Stage]:
    """The stages behind a run and, last, the run itself."""
    begun_with = manifest.get("continued_from")
    if begun_with is None:
        return [stage_of(manifest, results)]
    earlier = begun_with.get("lineage") or [given(begun_with["source"], begun_with.get("digest"))]
    return [*earlier, stage_of(manifest, results)]


def stage_of(manifest: Mapping[str, Any], results: Mapping[str, Any]) -> Stage:
    """What a run's record says of it, without what is of this machine alone.

    **Arguments:**

    - `manifest`: of the run. Keys that are not known here are kept under their own names: a later kind of stage brings its own.
    - `results`: of the run; empty where it has not ended.
    """
    session = manifest["sessions"][-1]
    device, command = session.get("device", {}), session.get("command", [])
    begun_with = manifest.get("continued_from")
    hours = None if "train_s" not in results else results["train_s"] / 3600
    stage = {
        "stage": command[2].removeprefix("recipes.") if len(command) > 2 else "trained",
        "began_with": None if begun_with is None else {name: begun_with.get(name) for name in ("source", "digest")},
        **{name: manifest[name] for name in _MANIFEST if name in manifest},
        **{name: value for name, value in manifest.items() if name not in _KNOWN},
        "settings": session.get("settings", {}),
        "hardware": {name: device[name] for name in _DEVICE if device.get(name) is not None},
        "versions": {name: device[name] for name in _VERSIONS if name in device},
        "ran_with": session.get("ran_with", {}),
        "sessions": len(manifest["sessions"]),
        "commit": session.get("commit"),
        "hours": hours,
        "results": dict(_figures(results)),
    }
    return public(stage)


def given(name: str, digest: str | None = None) -> Stage:
    """The first stage of a model whose making is not recorded."""
    return {"stage": GIVEN, "source": name} | ({} if digest is None else {"digest": digest})


def stages_behind(source: str | Path, *, revision: str | None = None) -> list[Stage]:
    """The lineage of a model that can be loaded: what its folder or its run says, else that it was given."""
    path = Path(source)
    if path.is_dir() or (not path.exists() and REPOSITORY.fullmatch(f"{source}")):
        folder = folder_of(f"{source}", revision)
        kept = next((file for file in (folder / LINEAGE_FILE, folder / "export" / LINEAGE_FILE) if file.is_file()), None)
        if kept is not None:
            return read(kept)
        if (folder / "manifest.json").is_file():
            return lineage(*record_of(folder))
    return [given(name_of(source))]


def record_of(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Manifest and results of a run folder; the results are empty where it has not ended. A manifest that was written before sessions kept
    their settings gets those of the run's `config.json`."""
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    results = json.loads((run / "results.json").read_text(encoding="utf-8")) if (run / "results.json").is_file() else {}
    if "settings" not in manifest["sessions"][-1] and (run / "config.json").is_file():
        manifest["sessions"][-1]["settings"] = json.loads((run / "config.json").read_text(encoding="utf-8"))
    return manifest, results


def read(file: Path) -> list[Stage]:
    """**Raises:** `ValueError` for what is no lineage."""
    found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, list) or not all(isinstance(stage, dict) and isinstance(stage.get("stage"), str) for stage in found):
        raise ValueError(f"{file} is no lineage: expected a list of stages, each an object with a name under 'stage'")
    return found


def name_of(source: str | Path) -> str:
    """What others may read of a source: `owner/name` of a repository, the last part of a path."""
    path = Path(source)
    return f"{source}" if not path.exists() and REPOSITORY.fullmatch(f"{source}") else path.resolve().name


def public(value: Any) -> Any:
    """The same with every path in it shortened to its last part, in keys too."""
    if isinstance(value, str):
        return _PATH.sub(lambda found: _shortened(found[0]), value)
    if isinstance(value, Mapping):
        short = {key: public(key) for key in value}
        names = list(short.values())
        twice = {name for name in names if names.count(name) > 1}
        return {f"{name} ({i})" if name in twice else name: public(value[key]) for i, (key, name) in enumerate(short.items(), 1)}
    if isinstance(value, Sequence):
        return [public(each) for each in value]
    return value


def _shortened(text: str) -> str:
    """The name of a place on this machine; all else that has a slash in it (`hf://…`, `owner/name`, `</s>`) as it is."""
    names_a_place = text.startswith(("~", "./", "../")) or (text.startswith("/") and text.strip("/").count("/") > 0)
    if "://" in text or not (names_a_place or Path(text).exists()):
        return text
    return Path(os.path.normpath(os.path.expanduser(text))).name


def _figures(results: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The numbers and words of results, without lists, which may be long."""
    for name, value in results.items():
        if isinstance(value, Mapping):
            yield name, dict(_figures(value))
        elif value is None or isinstance(value, str | int | float):
            yield name, value
