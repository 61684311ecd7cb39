"""A stand-in for W&B's server: as much of GraphQL as a run needs, and the rows of its file stream, which are kept."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

PROJECT = {"id": "p", "name": "nanochat", "entity": {"id": "e", "name": "me"}}


class Server(http.server.ThreadingHTTPServer):
    """Its `rows` are those of each run, by the run's id."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.rows: dict[str, list[dict[str, Any]]] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no error."""

    def stream(self, run: str, files: dict[str, Any]) -> None:
        part = files.get("wandb-history.jsonl")
        if part is not None:
            rows, first = self.rows[run], part["offset"]
            rows[first : first + len(part["content"])] = map(json.loads, part["content"])

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        run = variables.get("name") or ""
        bucket = {"id": run, "name": run, "displayName": run, "project": PROJECT, "sweepName": None}
        if operation == "UpsertBucket":
            rows = self.rows.setdefault(run, [])
            return {"upsertBucket": {"bucket": {**bucket, "historyLineCount": len(rows)}, "inserted": True}}
        if operation == "RunResumeStatus":
            rows = self.rows.get(run)
            if rows is None:
                return {"model": None}
            bucket |= {
                "summaryMetrics": json.dumps({"_step": rows[-1]["_step"]} if rows else {}), "config": "{}", "tags": [],
                "historyLineCount": len(rows), "eventsLineCount": 0, "logLineCount": 0, "eventsTail": "[]",
                "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]), "wandbConfig": '{"t": 1}',
            }  # fmt: skip
            return {"model": {**PROJECT, "bucket": bucket}}
        if operation == "CreateRunFiles":
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": []}}
        if operation == "OrganizationCoreWeaveOrganizationID":
            return {"entity": {"organization": {"coreWeaveOrganizationId": None}}}
        return {"viewer": {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            sent = gzip.decompress(sent)
        body = json.loads(sent)
        if self.path.endswith("/file_stream"):
            self.server.stream(self.path.split("/")[-2], body.get("files") or {})
            self._send({"limits": {}})
        else:
            operation = body.get("operationName") or body["query"].split("(")[0].split("{")[0].split()[-1]
            self._send({"data": self.server.answer(operation, body.get("variables") or {})})

    def do_GET(self) -> None:
        self._send({})

    def _send(self, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None: ...


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """A server in a thread."""
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()
