"""A server that answers as the hub does for datasets in a local folder: `OWNER/NAME/...` below `root`.

The files of repositories named `OWNER/gated*` need a token that nobody has. Requests are kept in `log`.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" + 34 * "0"


class HubHandler(http.server.BaseHTTPRequestHandler):
    """Answers what `datasets` and `HfFileSystem` ask."""

    protocol_version = "HTTP/1.1"
    root: Path
    log: list[tuple[str, str, str]]

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer_file()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.log.append(("GET", path, self.headers.get("Range", "")))
        if path.startswith("/api/"):
            self._answer_api(path)
        else:
            self._answer_file()

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        self.log.append(("POST", path, body))
        try:
            wanted = json.loads(body)["paths"]
        except ValueError:
            wanted = parse_qs(body)["paths"]
        repository = self._repository(path)
        if repository is not None:
            self._send_json(
                [self._entry(repository, name) for name in wanted if (repository / name).exists()]
            )

    def _repository(self, path: str) -> Path | None:
        """Return the folder of the repository that is asked for, or answer that there is none."""
        owner, name = path.removeprefix("/api").removeprefix("/datasets/").split("/")[:2]
        if not (self.root / owner / name).is_dir():
            self._refuse(404, "RepoNotFound", "Repository not found")
            return None
        return self.root / owner / name

    def _answer_api(self, path: str) -> None:
        found = re.fullmatch(r"/api/datasets/[^/]+/[^/]+(?:/(revision|tree)/([^/]+)(?:/(.*))?)?", path)
        if found is None:
            self._refuse(404, "EntryNotFound", "no such address")
            return
        repository = self._repository(path)
        if repository is None:
            return
        if found[2] not in (None, "main", COMMIT):
            self._refuse(404, "RevisionNotFound", "no such revision")
        elif found[1] == "tree":
            self._answer_tree(repository, found[3] or "")
        else:
            files = [file for file in sorted(repository.rglob("*")) if file.is_file()]
            names = [{"rfilename": file.relative_to(repository).as_posix()} for file in files]
            id_ = repository.relative_to(self.root).as_posix()
            self._send_json({"id": id_, "sha": COMMIT, "siblings": names, "tags": [], "private": False})

    def _answer_tree(self, repository: Path, below: str) -> None:
        folder = repository / below
        if not folder.is_dir():
            self._refuse(404, "EntryNotFound", "no such folder")
            return
        recursive = "true" in parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower()
        inside = sorted(folder.rglob("*") if recursive else folder.iterdir())
        self._send_json([self._entry(repository, p.relative_to(repository).as_posix()) for p in inside])

    def _entry(self, repository: Path, name: str) -> dict:
        path = repository / name
        if path.is_dir():
            return {"type": "directory", "oid": "0", "size": 0, "path": name}
        return {"type": "file", "oid": self._oid(path), "size": path.stat().st_size, "path": name}

    def _oid(self, path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:40]

    def _answer_file(self) -> None:
        path = unquote(urlsplit(self.path).path)
        found = re.fullmatch(r"/datasets/[^/]+/[^/]+/resolve/[^/]+/(.+)", path)
        repository = self._repository(path) if found else None
        if found is None or repository is None:
            if found is None:
                self._refuse(404, "EntryNotFound", "no such address")
            return
        if repository.name.startswith("gated"):
            self._refuse(403, "GatedRepo", "Access to this dataset is restricted")
            return
        file = repository / found[1]
        if not file.is_file():
            self._refuse(404, "EntryNotFound", "no such file")
            return
        content = file.read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{self._oid(file)}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            start, size = int(asked[1]), len(content)
            content = content[start : int(asked[2]) + 1 if asked[2] else None]
            headers["Content-Range"] = f"bytes {start}-{start + len(content) - 1}/{size}"
        self._send(206 if asked else 200, content, headers)

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._send(status, message.encode(), {"X-Error-Code": code, "X-Error-Message": message})

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def hub_server(root: Path) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Serve the repositories below `root`; yield the address and the list of requests."""
    log: list[tuple[str, str, str]] = []
    handler = type("Handler", (HubHandler,), {"root": root, "log": log})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", log
        running.shutdown()
