"""This module has a server on this machine that answers as the Hugging Face Hub does, and models for it."""

from __future__ import annotations

import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cases import random_model

import tarflow_fast as tff
from tarflow_fast.models.tarflow import TarFlow

COMMIT, OLD = "c" * 40, "0" * 40


def model(seed: int = 0) -> TarFlow:
    made = random_model(seed, in_channels=3, img_size=4, num_classes=2)
    made.metadata = {"noise_type": "gaussian", "noise_std": 0.1, "class_names": ["a", "b"]}
    return made


class Server(ThreadingHTTPServer):
    """A server has a repository, "owner/name" at COMMIT, and plain files under /files/. requests: what was asked
    for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.short = 0
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def answer(self, body: bool) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        headers: dict[str, str] = {}
        status, data = 404, b""
        found = re.fullmatch(r"/owner/name/resolve/([^/]+)/(.+)", self.path)
        if self.path.startswith("/files/"):
            data = self.server.files.get(self.path[7:].partition("?")[0], b"")
            status = 200 if data else 404
        elif re.fullmatch(rf"/api/models/owner/name(/revision/(main|{COMMIT}))?(\?.*)?", self.path):
            siblings = [{"rfilename": name} for name in self.server.files]
            status, data = 200, json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": siblings}).encode()
        elif re.match(rf"/api/models/owner/name/tree/(main|{COMMIT})", self.path):
            tree = [{"type": "file", "path": n, "size": len(d), "oid": "1"} for n, d in self.server.files.items()]
            status, data = 200, json.dumps(tree).encode()
        elif found and found[1] not in ("main", COMMIT):
            headers["X-Error-Code"] = "RevisionNotFound"
        elif found and found[2] not in self.server.files:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
        elif found:
            status, data = 200, self.server.files[found[2]]
            headers |= {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        else:
            headers["X-Error-Code"] = "RepoNotFound"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data[: len(data) - self.server.short])


def saved(tmp_path: Path, name: str, seed: int = 0) -> bytes:
    tff.save(model(seed), tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    return data
