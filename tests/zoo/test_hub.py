"""Pushing to and pulling from the Hugging Face hub, with its own library, against a server in memory."""

from __future__ import annotations

import base64
import http.server
import json
import logging
import shutil
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from nanochat.cli import main

pytest.importorskip("huggingface_hub")


class Hub(http.server.ThreadingHTTPServer):
    """What `create_repo`, `upload_folder`, `file_exists` and a download ask for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.repositories: set[str] = set()
        self.refuse = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_) -> None:
        pass

    def answer(self, status: int, content: bytes | dict, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if "/resolve/main/" in path:
            name = path.split("/resolve/main/")[1]
            if name not in self.server.files:
                self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            else:
                self.answer(200, self.server.files[name], ETag='"1"', X_Repo_Commit="0" * 40)
        elif path == "/api/models/me/small" or path.startswith("/api/models/me/small/revision"):
            self.answer(200, {"id": "me/small", "sha": "0" * 40, "private": False, "tags": [], "siblings": []})
        else:
            self.answer(200, {})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        if self.server.refuse:
            self.answer(403, {"error": "You may not write here"})
        elif path == "/api/repos/create":
            self.server.repositories.add(json.loads(body)["name"])
            self.answer(200, {"url": f"{self.server.address}/me/small"})
        elif "/preupload/" in path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif "/commit/" in path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.answer(200, {"commitUrl": f"{self.server.address}/me/small/commit/1", "commitOid": "1" * 40})
        else:
            self.answer(200, {"warnings": [], "errors": []})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            server.address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_push_and_get(added, zoo, hub, capsys):
    shutil.copytree(added, zoo / "small")
    assert main(["zoo", "push", "small", "hf:me/small"]) == 0
    command = capsys.readouterr().out.split()
    assert hub.repositories == {"small"}
    assert hub.files == {path.name: path.read_bytes() for path in added.iterdir()}
    assert main(["zoo", "push", "small", "hf:me/small"]) == 2
    assert "--force" in capsys.readouterr().err
    shutil.rmtree(zoo / "small")
    assert main(command[1:]) == 0
    assert {p.name: p.read_bytes() for p in (zoo / "small").iterdir()} == hub.files
    assert main(["zoo", "list", "hf:me/small"]) == 0
    assert "small" in capsys.readouterr().out


def test_a_changed_file_on_the_hub_is_refused(added, zoo, hub, capsys):
    hub.files = {path.name: path.read_bytes() for path in added.iterdir()}
    hub.files["model.json"] += b" "
    assert main(["zoo", "get", "hf:me/small"]) == 2
    assert "is longer than" in capsys.readouterr().err
    del hub.files["model.json"]
    assert main(["zoo", "get", "hf:me/small"]) == 2
    assert "has no file model.json" in capsys.readouterr().err
    assert not list(zoo.iterdir())


def test_a_refusal_is_one_sentence(added, zoo, hub, capsys, monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", False)  # handlers of earlier tests may have lost their stream
    shutil.copytree(added, zoo / "small")
    hub.refuse = True
    assert main(["zoo", "push", "small", "hf:me/small"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: hf:me/small cannot be written")
    assert error.count("\n") == 1


def test_no_network_is_one_sentence(zoo, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:1/{repo_id}/{revision}/{filename}"
    )
    assert main(["zoo", "get", "hf:me/small"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
