"""What the Hub of `hub_server` holds, what it has seen, what is to go wrong, and the rules it has for cards."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

LICENCES = {"apache-2.0", "mit", "cc-by-4.0", "cc0-1.0", "gpl-3.0", "bsd-3-clause", "openrail", "llama3.2", "gemma", "unknown", "other"}


@dataclass(frozen=True)
class Blob:
    """A file of a commit."""

    sha256: str
    git: str  # sha1, as git counts it
    size: int
    lfs: bool


@dataclass
class Repository:
    private: bool
    branches: dict[str, str] = field(default_factory=dict)  # name → commit
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)  # commit → path → file
    messages: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)

    def commit(self, files: dict[str, Blob], branch: str, message: str) -> str:
        words = json.dumps([sorted((path, blob.sha256) for path, blob in files.items()), self.branches.get(branch), message])
        oid = hashlib.sha1(words.encode()).hexdigest()
        self.commits[oid], self.branches[branch], self.messages[oid] = files, oid, message
        return oid


@dataclass
class Fault:
    """What goes wrong with requests that match: a status, or a connection that is closed in the middle of the body."""

    method: str
    path: re.Pattern[str]
    status: int | None
    left: int


@dataclass
class State:
    """What the Hub holds and has seen."""

    folder: Path  # of the files' bytes, by sha256
    tokens: dict[str, tuple[str, bool]]  # token → user, may write
    repositories: dict[str, Repository] = field(default_factory=dict)
    seen: list[tuple[str, str]] = field(default_factory=list)  # method, path
    faults: list[Fault] = field(default_factory=list)
    address: str = ""

    def fail(self, method: str, path: str, status: int | None = None, times: int = 1) -> None:
        """The next requests that match get this status; `None` closes the connection while they are sent."""
        self.faults.append(Fault(method, re.compile(path), status, times))

    def count(self, method: str, path: str) -> int:
        """How many requests came that match."""
        return sum(how == method and re.search(path, where) is not None for how, where in self.seen)

    def keep(self, content: bytes, lfs: bool) -> Blob:
        """A small file's bytes on the disk."""
        sha256 = hashlib.sha256(content).hexdigest()
        (self.folder / sha256).write_bytes(content)
        return Blob(sha256, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), len(content), lfs)

    def fault(self, method: str, path: str) -> Fault | None:
        found = next((each for each in self.faults if each.left and each.method == method and each.path.search(path)), None)
        if found is not None:
            found.left -= 1
        return found


def problems(card: str) -> list[str]:
    """What is wrong with a card's front matter, by the Hub's rules as far as they are written down."""
    match = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", card, re.DOTALL)
    if match is None:
        return ["no front matter"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"no YAML: {error}"]
    found = []
    if "license" in data and data["license"] not in LICENCES:
        found.append(f'"license" must be one of {sorted(LICENCES)}')
    if data.get("license") == "other" and not {"license_name", "license_link"} <= data.keys():
        found.append('"license: other" needs license_name and license_link')
    for name in ("tags", "language", "datasets"):
        if name in data and not (isinstance(data[name], list) and all(isinstance(each, str) for each in data[name])):
            found.append(f'"{name}" must be a list of words')
    for name in ("library_name", "pipeline_tag"):
        if not isinstance(data.get(name, ""), str):
            found.append(f'"{name}" must be a word')
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", data.get("base_model", "a/b")):
        found.append('"base_model" must be owner/name')
    for model in data.get("model-index", []):
        if not model.get("name"):
            found.append('"model-index[0].name" is required')
        for result in model["results"]:
            if not (result["task"].get("type") and result["dataset"].get("name") and result["dataset"].get("type")):
                found.append("a result needs task.type, dataset.name and dataset.type")
            if not all(metric.get("type") and "value" in metric for metric in result["metrics"]):
                found.append("a metric needs type and value")
    return found
