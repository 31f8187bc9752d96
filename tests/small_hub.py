"""A small Hub on this machine, for what `huggingface_hub` asks when it takes a snapshot of one repository, and its clients."""

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Answering(BaseHTTPRequestHandler):
    """JSON answers, and no words on the screen."""

    protocol_version = "HTTP/1.1"

    def reply(self, content: object, status: int = 200, extra: dict[str, str] | None = None) -> None:
        raw = json.dumps(content).encode()
        self.send_response(status)
        for header, value in {"Content-Type": "application/json", "Content-Length": str(len(raw)), **(extra or {})}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        pass


class Hub(Answering):
    """The calls that a snapshot makes. `seen` holds each: method, path, range."""

    kind: str  # "datasets" or "models"
    repo: str  # "owner/name"
    files: dict[str, bytes]
    seen: list[tuple[str, str, str | None]]
    cut_once: set[str]  # files whose first answer breaks off in the middle
    token: str | None  # without it the repository is gated
    address: str

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        self.seen.append((self.command, path, self.headers.get("Range")))
        api, here = f"/api/{self.kind}/{self.repo}", f"/{self.repo}" if self.kind == "models" else f"/{self.kind}/{self.repo}"
        if path.startswith((f"{api}/", f"{here}/")) and self.token and self.headers.get("Authorization") != f"Bearer {self.token}":
            self.reply({"error": "gated"}, status=403, extra={"X-Error-Code": "GatedRepo"})
        elif path in (f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            self.reply({"id": self.repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files]})
        elif path.startswith(f"{api}/tree/"):
            rows = enumerate(self.files.items())
            self.reply([{"type": "file", "path": name, "size": len(raw), "oid": f"{i:040}"} for i, (name, raw) in rows])
        elif (name := path.removeprefix(f"{here}/resolve/{COMMIT}/")) in self.files:
            self.file(name, body)
        else:
            code = "RevisionNotFound" if path.startswith(f"{api}/") else "RepoNotFound"
            self.reply({"error": "not here"}, status=404, extra={"X-Error-Code": code})

    def file(self, name: str, body: bool) -> None:
        raw = self.files[name]
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(raw) - 1}/{len(raw)}")
        for header, value in (
            ("ETag", f'"{list(self.files).index(name):040}"'),
            ("X-Repo-Commit", COMMIT),
            ("Content-Length", len(raw) - start),
        ):
            self.send_header(header, str(value))
        self.end_headers()
        if body and name in self.cut_once:
            self.cut_once.remove(name)
            self.wfile.write(raw[: len(raw) // 2])
            self.close_connection = True
        elif body:
            self.wfile.write(raw[start:])


@contextmanager
def serving(kind: str, repo: str, files: dict[str, bytes], token: str | None = None) -> Iterator[type[Hub]]:
    """A Hub with one repository, at `address`."""
    own = {"kind": kind, "repo": repo, "files": files, "seen": [], "cut_once": set(), "token": token}
    handler = type("OwnHub", (Hub,), own)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.address = f"http://127.0.0.1:{server.server_port}"
    yield handler
    server.shutdown()
    server.server_close()


def environment(hub: type[Hub], home: object, **more: str) -> dict[str, str]:
    """Of a process that knows this Hub alone, and keeps its cache in `home`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name.lower()}
    settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return kept | settings | more


# Clients are processes of their own, since `huggingface_hub` reads its settings when it is imported. They are forked from one that has
# imported what takes seconds, and not that.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["jax", "equinox", "grain", "tokenizers"])


def in_a_client(environ: dict[str, str], task: Callable[..., Any], *arguments: Any) -> Any:
    """What `task(*arguments)` gives in a process with this environment; the task imports what it needs itself."""
    receiving, sending = FORKS.Pipe(duplex=False)
    client = FORKS.Process(target=_answer, args=(sending, environ, task, arguments))
    client.start()
    sending.close()
    try:
        assert receiving.poll(300), "no answer"
        return receiving.recv()
    finally:
        client.kill()
        client.join()


def _answer(sending: Connection, environ: dict[str, str], task: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environ)
    sending.send(task(*arguments))


def load_models(asked: list[tuple[str, str | None]]) -> list[str | float]:
    """For each source and revision: the sum of all weights, or the words of the error."""
    import lm

    found: list[str | float] = []
    for source, revision in asked:
        try:
            found.append(fingerprint(lm.load_pretrained(source, revision=revision)))
        except (ValueError, FileNotFoundError) as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def fingerprint(model: Any) -> float:
    import jax
    import numpy as np

    return sum(float(np.abs(leaf).sum(dtype=np.float64)) for leaf in jax.tree.leaves(model))


def open_sources(specs: list[str]) -> list[dict[str, Any]]:
    """For each spec: the record, name and texts of the source, or the words of the error."""
    import huggingface_hub.constants

    from data.sources import open_source

    huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1 << 12  # what arrived before a cut is kept in steps of this
    found: list[dict[str, Any]] = []
    for spec in specs:
        try:
            source = open_source(spec)
        except ValueError as error:
            found.append({"error": str(error)})
            continue
        texts = {d[i]["name"]: d[i]["text"] for d in (source.train, source.held_out) for i in range(len(d))}
        found.append({"record": source.record, "texts": texts, "name": source.name})
    return found
