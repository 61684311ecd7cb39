"""A small asynchronous client of a server on this machine, for benches and load tests: one connection a request."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nanochat.errors import UserError


@dataclass(frozen=True)
class Place:
    """Where a server listens, and its process."""

    host: str
    port: int
    pid: int


@contextmanager
def server_process(arguments: Sequence[str], threads: int = 1):
    """A `nanochat serve` of its own process on a free port of this machine; yields its `Place` when it answers.

    Raises `UserError` with its own words when it does not start.
    """
    command = [sys.executable, "-m", "nanochat.cli", "serve", *arguments, "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("nanochat is at http://"):
                break
        else:
            raise UserError(f"the server did not start: {''.join(said).strip()}")
        host, _, port = said[-1].split("//")[1].strip().rpartition(":")
        place = Place(host, int(port), process.pid)
        asyncio.run(_wait(place))
        yield place
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stderr.close()


async def _wait(place: Place, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while True:
        status, _ = await request(place, "GET", "/health")
        if status == 200:
            return
        if time.monotonic() > end:
            raise UserError("the server did not become ready.")
        await asyncio.sleep(0.05)


def _head(place: Place, method: str, path: str, body: bytes) -> bytes:
    return (
        f"{method} {path} HTTP/1.1\r\nHost: {place.host}:{place.port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    ).encode() + body


async def _status(reader: asyncio.StreamReader) -> int:
    line = await reader.readline()
    while (await reader.readline()).strip():
        pass
    parts = line.split()
    if len(parts) < 2:
        raise ConnectionError("the server closed the connection.")
    return int(parts[1])


async def request(place: Place, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    """A whole reply: status and body (which must come in one piece, as all but streams do)."""
    reader, writer = await asyncio.open_connection(place.host, place.port)
    try:
        writer.write(_head(place, method, path, body))
        await writer.drain()
        return await _status(reader), await reader.read()
    finally:
        writer.close()


async def stream(place: Place, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The events of a streamed reply up to `[DONE]`; leaving early closes the connection.

    Raises `ConnectionError` for another status than 200, an error event, or an end without `[DONE]`.
    """
    reader, writer = await asyncio.open_connection(place.host, place.port)
    try:
        writer.write(_head(place, "POST", path, json.dumps({**body, "stream": True}).encode()))
        await writer.drain()
        status = await _status(reader)
        if status != 200:
            raise ConnectionError(f"status {status}")
        while line := await reader.readline():
            if not line.startswith(b"data: "):  # sizes of chunks, blank lines
                continue
            data = line[6:].strip()
            if data == b"[DONE]":
                return
            event = json.loads(data)
            if "error" in event:
                raise ConnectionError(event["error"]["message"])
            yield event
        raise ConnectionError("the stream ended early.")
    finally:
        writer.close()
