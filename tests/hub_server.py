"""A Hub on this machine that takes models and gives them back, for `huggingface_hub` as it is.

It speaks the client's plain protocol: who am I, create, branch, validate, preupload, LFS (batch, PUT, verify), commit, tree, resolve. Large
files lie in a folder under their sha256, so what was sent once is not asked for again. It has no Xet storage: clients of it need
HF_HUB_DISABLE_XET=1. It listens on 127.0.0.1 alone, refuses bodies above `MOST_BYTES`, and ends by itself.

    python tests/hub_server.py FOLDER --minutes 10 --token hf_any --user me

`seen` holds every request, `fail` makes the next ones go wrong.
"""

import argparse
import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from hub_state import Blob, Repository, State, problems
from small_hub import Answering

MOST_BYTES = 2 << 30
LARGE = (".safetensors", ".png", ".bin", ".gguf")
LARGE_BYTES = 10 << 20


class Problem(Exception):
    """An answer that is an error: status, words, code of the Hub."""

    def __init__(self, status: int, words: str, code: str = "") -> None:
        super().__init__(words)
        self.status, self.words, self.code = status, words, code


class Handler(Answering):
    state: State

    def do_GET(self) -> None:
        self.handle_one()

    do_HEAD = do_POST = do_PUT = do_GET

    def handle_one(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.state.seen.append((self.command, path))
        fault = self.state.fault(self.command, path)
        if fault is not None and fault.status is None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)  # half of it, and then no more
            self.close_connection = True
            self.connection.close()
            return
        body = self.body()
        try:
            if fault is not None:
                raise Problem(fault.status or 500, "in trouble")
            for method, pattern, answer in ROUTES:
                if (method == self.command or (method == "GET" and self.command == "HEAD")) and (match := pattern.fullmatch(path)):
                    answer(self, body, *match.groups())
                    return
            raise Problem(404, f"no such address: {path}")
        except Problem as problem:
            headers = {"X-Error-Code": problem.code, "X-Error-Message": problem.words} if problem.code else {}
            self.reply({"error": problem.words}, problem.status, headers)
        finally:
            body.unlink(missing_ok=True)

    def body(self) -> Path:
        """What was sent, in a file: it may be large."""
        kept = self.state.folder / f"incoming-{threading.get_ident()}"
        left = int(self.headers.get("Content-Length") or 0)
        chunked = "chunked" in (self.headers.get("Transfer-Encoding") or "")
        with kept.open("wb") as file:
            while left or chunked:
                if chunked and not left:
                    left = int(self.rfile.readline().split(b";")[0] or b"0", 16)
                    if not left:
                        self.rfile.readline()
                        break
                part = self.rfile.read(min(left, 1 << 20))
                if not part:
                    break
                left -= len(part)
                file.write(part)
                assert file.tell() <= MOST_BYTES
                if chunked and not left:
                    self.rfile.readline()
        return kept

    # ------------------------------------------------------------------------------------------- who, and what is there

    def user(self, *, needed: bool = False) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.state.tokens:
            raise Problem(401, "Invalid credentials in Authorization header")
        if needed and not token:
            raise Problem(401, "Invalid username or password.")
        return self.state.tokens[token][0] if token else None

    def writer(self, owner: str) -> None:
        user = self.user(needed=True)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if user != owner or not self.state.tokens[token][1]:
            raise Problem(403, f"You don't have the rights to write in the namespace {owner}")

    def repository(self, name: str) -> Repository:
        user, found = self.user(), self.state.repositories.get(name)
        if found is None or (found.private and user != name.split("/")[0]):
            raise Problem(404 if user else 401, "Repository not found", "RepoNotFound")
        return found

    def files(self, name: str, revision: str) -> tuple[str, dict[str, Blob]]:
        repository = self.repository(name)
        commit = repository.at(revision)
        if commit is None:
            raise Problem(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit, repository.commits[commit]

    def whoami(self, body: Path) -> None:
        self.reply({"type": "user", "name": self.user(needed=True), "orgs": []})

    def create(self, body: Path) -> None:
        asked = json.loads(body.read_bytes())
        owner = asked.get("organization") or self.user(needed=True)
        name = f"{owner}/{asked['name']}"
        self.writer(owner)
        if name in self.state.repositories:
            raise Problem(409, "You already created this model repo")
        repository = self.state.repositories[name] = Repository(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        repository.commit({".gitattributes": self.state.keep(b"*.safetensors filter=lfs\n", False)}, "main", "initial commit")
        self.reply({"url": f"{self.state.address}/{name}", "name": name, "id": name})

    def branch(self, body: Path, name: str, branch: str) -> None:
        repository = self.repository(name)
        self.writer(name.split("/")[0])
        if branch in repository.branches:
            raise Problem(409, "Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        self.reply({})

    def info(self, body: Path, name: str, revision: str = "main") -> None:
        commit, files = self.files(name, revision)
        private = self.state.repositories[name].private
        self.reply({"id": name, "sha": commit, "private": private, "tags": [], "siblings": [{"rfilename": path} for path in files]})

    def tree(self, body: Path, name: str, revision: str) -> None:
        _, files = self.files(name, revision)
        rows = []
        for path, blob in files.items():
            row = {"type": "file", "path": path, "size": blob.size, "oid": blob.git}
            rows.append(row | ({"lfs": {"oid": blob.sha256, "size": blob.size, "pointerSize": 130}} if blob.lfs else {}))
        self.reply(rows)

    def resolve(self, body: Path, name: str, revision: str, path: str) -> None:
        commit, files = self.files(name, revision)
        if path not in files:
            raise Problem(404, "Entry not found", "EntryNotFound")
        blob = files[path]
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{blob.size - 1}/{blob.size}")
        self.send_header("ETag", f'"{blob.sha256 if blob.lfs else blob.git}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(blob.size - start))
        self.end_headers()
        if self.command == "GET":
            with (self.state.folder / blob.sha256).open("rb") as file:
                file.seek(start)
                while part := file.read(1 << 20):
                    self.wfile.write(part)

    # ------------------------------------------------------------------------------------------- taking

    def validate(self, body: Path) -> None:
        errors = problems(json.loads(body.read_bytes())["content"])
        self.reply({"errors": [{"message": words} for words in errors], "warnings": []}, 400 if errors else 200)

    def preupload(self, body: Path, name: str, revision: str) -> None:
        _, there = self.files(name, revision)
        self.writer(name.split("/")[0])
        rows = []
        for file in json.loads(body.read_bytes())["files"]:
            large = file["path"].endswith(LARGE) or file["size"] > LARGE_BYTES
            known = there.get(file["path"])
            oid = None if known is None else known.sha256 if known.lfs else known.git
            rows.append({"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid})
        self.reply({"files": rows})

    def batch(self, body: Path, name: str) -> None:
        self.repository(name)
        self.writer(name.split("/")[0])
        rows = []
        for wanted in json.loads(body.read_bytes())["objects"]:
            there = (self.state.folder / wanted["oid"]).is_file()
            address = f"{self.state.address}/lfs/{wanted['oid']}"
            rows.append(wanted | ({} if there else {"actions": {"upload": {"href": address}, "verify": {"href": f"{address}/verify"}}}))
        self.reply({"transfer": "basic", "objects": rows})

    def put(self, body: Path, oid: str) -> None:
        with body.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != oid:
                raise Problem(400, "the bytes are not those of the digest")
        body.rename(self.state.folder / oid)
        self.reply({})

    def verify(self, body: Path, oid: str) -> None:
        self.user(needed=True)
        file = self.state.folder / oid
        if not file.is_file() or file.stat().st_size != json.loads(body.read_bytes())["size"]:
            raise Problem(404, "object not found or of another size")
        self.reply({})

    def commit(self, body: Path, name: str, branch: str) -> None:
        head, files = self.files(name, branch)
        self.writer(name.split("/")[0])
        header, *changes = (json.loads(line) for line in body.read_bytes().splitlines())
        if header["value"].get("parentCommit", head) != head:
            raise Problem(412, "A commit has happened since. Please refresh and try again.")
        files = dict(files)
        for change in changes:
            value = change["value"]
            if change["key"] == "file":
                files[value["path"]] = self.state.keep(base64.b64decode(value["content"]), False)
            elif change["key"] == "lfsFile":
                if not (self.state.folder / value["oid"]).is_file():
                    raise Problem(400, f"LFS object {value['oid']} was not sent")
                files[value["path"]] = Blob(value["oid"], hashlib.sha1(value["oid"].encode()).hexdigest(), value["size"], True)
            else:
                assert change["key"] == "deletedFile", change
                del files[value["path"]]
        oid = self.state.repositories[name].commit(files, branch, header["value"]["summary"])
        self.reply({"success": True, "commitOid": oid, "commitUrl": f"{self.state.address}/{name}/commit/{oid}"})


_NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (method, re.compile(pattern), answer)
    for method, pattern, answer in (
        ("GET", "/api/whoami-v2", Handler.whoami),
        ("POST", "/api/repos/create", Handler.create),
        ("POST", "/api/validate-yaml", Handler.validate),
        ("POST", f"/api/models/{_NAME}/branch/(.+)", Handler.branch),
        ("GET", f"/api/models/{_NAME}", Handler.info),
        ("GET", f"/api/models/{_NAME}/revision/(.+)", Handler.info),
        ("GET", f"/api/models/{_NAME}/tree/([^/]+)", Handler.tree),
        ("POST", f"/api/models/{_NAME}/preupload/(.+)", Handler.preupload),
        ("POST", f"/api/models/{_NAME}/commit/(.+)", Handler.commit),
        ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", Handler.batch),
        ("PUT", "/lfs/([0-9a-f]{64})", Handler.put),
        ("POST", "/lfs/([0-9a-f]{64})/verify", Handler.verify),
        ("GET", f"/{_NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
    )
]


@contextmanager
def serving(folder: Path, tokens: dict[str, tuple[str, bool]], *, seconds: float = 300) -> Iterator[State]:
    """A Hub at `address`, for this long at most."""
    folder.mkdir(parents=True, exist_ok=True)
    state = State(folder, tokens)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OwnHandler", (Handler,), {"state": state}))
    server.handle_error = lambda *_: None  # a client that is gone
    state.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    end = threading.Timer(seconds, server.shutdown)
    end.daemon = True
    end.start()
    try:
        yield state
    finally:
        end.cancel()
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    asked.add_argument("folder", type=Path, help="where the files lie")
    asked.add_argument("--minutes", type=float, default=10)
    asked.add_argument("--token", default="hf_any")
    asked.add_argument("--user", default="me")
    chosen = asked.parse_args()
    with serving(chosen.folder, {chosen.token: (chosen.user, True)}, seconds=60 * chosen.minutes) as hub:
        print(f"HF_ENDPOINT={hub.address} HF_TOKEN={chosen.token} HF_HUB_DISABLE_XET=1", flush=True)
        time.sleep(60 * chosen.minutes)
