"""manifest.json of a model in a zoo: what it is, what was measured, and the hash of every file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
CARD = "README.md"
LARGEST_MANIFEST = 1 << 20
"""bytes"""
NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]|[._](?=[a-z0-9])){0,63}")
FILE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?=[A-Za-z0-9])){0,99}")
SUFFIXES = (".gguf", ".json", ".md", ".jinja", ".html")
"""of the files of a model: data and text; nothing that runs when it is loaded"""
SHA256 = re.compile(r"[0-9a-f]{64}")
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # names of devices on Windows


def check_replace(where: object, exists: bool, is_model: bool, force: bool, hint: str = "") -> None:
    """Raise `UserError` unless a model may be written to a place: nothing is there, or a model that gives way.

    Args:
        where: the place, as the user knows it. is_model: it holds a manifest. hint: another way out.
    """
    if exists and not force:
        raise UserError(f"{where} exists; use --force to replace it{hint}.")
    if exists and not is_model:
        raise UserError(f"{where} is not a model of a zoo, so --force does not replace it.")


@dataclass(frozen=True)
class Metric:
    """A figure and its 95% interval, where it has one."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    how: str = ""
    """what it was measured on, and over how many runs"""

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f" ({self.low:.4g} to {self.high:.4g})"
        return f"{self.value:.4g}{interval}"


@dataclass(frozen=True)
class Manifest:
    """Everything that is said of a model; `files` has name -> (SHA-256, bytes)."""

    name: str
    licence: str
    """SPDX identifier"""
    summary: str
    """one sentence"""
    weights: str
    """name of the GGUF file"""
    files: dict[str, tuple[str, int]]
    model: dict[str, Any] = field(default_factory=dict)
    """architecture, type, embedding_type, parameters, step, config"""
    data: dict[str, str] = field(default_factory=dict)
    """the data card: corpus, licence, and what else is known, as text"""
    metrics: tuple[Metric, ...] = ()
    commands: dict[str, str] = field(default_factory=dict)
    """what it is for -> the command"""
    created: str = ""
    """date, YYYY-MM-DD"""
    version: str = ""
    """of nanochat"""

    @property
    def size(self) -> int:
        """bytes of all files"""
        return sum(size for _, size in self.files.values())

    def encode(self) -> bytes:
        """The content of manifest.json."""
        values: dict[str, Any] = {"format": FORMAT, **dataclasses.asdict(self)}
        values["files"] = {name: {"sha256": digest, "size": size} for name, (digest, size) in self.files.items()}
        values["metrics"] = [
            {k: v for k, v in dataclasses.asdict(metric).items() if v not in (None, "")} for metric in self.metrics
        ]
        return (json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def decode(content: bytes, source: str) -> Manifest:
    """The manifest in the bytes of a manifest.json.

    Raises `UserError`, naming `source`, for anything that is not a manifest or that names a file outside of its folder.
    """
    if len(content) > LARGEST_MANIFEST:
        raise UserError(f"{source}: the manifest has more than {LARGEST_MANIFEST:,} bytes.")
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is not a manifest: it is not JSON.") from error
    if not isinstance(values, dict) or not isinstance(values.get("format"), int):
        raise UserError(f"{source} is not a manifest of a model.")
    if values["format"] != FORMAT:
        raise UserError(f"{source} has format {values['format']}, and this nanochat reads {FORMAT}: use a newer one.")

    def wrong(key: str) -> UserError:
        return UserError(f"{source}: the manifest's {key!r} is missing or malformed.")

    for key in ("name", "licence", "summary", "weights", "created", "version"):
        if not isinstance(values.get(key), str):
            raise wrong(key)
    for key in ("model", "data", "commands", "files"):
        if not isinstance(values.get(key), dict):
            raise wrong(key)
    for key in ("data", "commands"):
        if not all(isinstance(text, str) for text in values[key].values()):
            raise wrong(key)
    check_name(values["name"], source)
    files = {name: _file(name, entry, source) for name, entry in values["files"].items()}
    if len({name.lower() for name in files}) != len(files):
        raise UserError(f"{source}: two files differ only in case.")
    if values["weights"] not in files or not values["weights"].endswith(".gguf"):
        raise wrong("weights")
    metrics = values.get("metrics")
    if not isinstance(metrics, list):
        raise wrong("metrics")
    return Manifest(
        **{key: values[key] for key in ("name", "licence", "summary", "weights", "created", "version")},
        **{key: values[key] for key in ("model", "data", "commands")},
        files=files,
        metrics=tuple(_metric(entry, source) for entry in metrics),
    )


def check_name(name: str, source: str = "") -> None:
    """Raise `UserError` for a name that could not be a folder everywhere."""
    if not NAME.fullmatch(name) or RESERVED.fullmatch(name):
        prefix = f"{source}: " if source else ""
        raise UserError(f"{prefix}{name[:80]!r} is not a model's name: use small letters, digits, '-', '.' and '_'.")


def _file(name: str, entry: Any, source: str) -> tuple[str, int]:
    if not FILE.fullmatch(name) or RESERVED.fullmatch(name) or name == MANIFEST:
        raise UserError(f"{source}: {name[:80]!r} is not a file name inside the model's folder; refused.")
    if not name.endswith(SUFFIXES):
        raise UserError(f"{source}: {name} is of a kind that a zoo does not hold ({', '.join(SUFFIXES)}); refused.")
    digest, size = (entry.get("sha256"), entry.get("size")) if isinstance(entry, Mapping) else (None, None)
    if not isinstance(digest, str) or not SHA256.fullmatch(digest) or type(size) is not int or size < 0:
        raise UserError(f"{source}: the entry of {name} lacks a SHA-256 or a size.")
    return digest, size


def _metric(entry: Any, source: str) -> Metric:
    if isinstance(entry, dict) and set(entry) <= {f.name for f in dataclasses.fields(Metric)}:
        numbers = [entry.get("value"), entry.get("low", 0.0), entry.get("high", 0.0)]
        texts = [entry.get("name"), entry.get("how", "")]
        if all(type(n) in (int, float) and math.isfinite(n) for n in numbers) and all(type(t) is str for t in texts):
            return Metric(**entry)
    raise UserError(f"{source}: an entry of the manifest's 'metrics' is malformed.")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a model's folder; raises `UserError` when there is none that can be read."""
    path = folder / MANIFEST
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_MANIFEST + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    return decode(content, str(path))


def digest_of(path: Path) -> tuple[str, int]:
    """SHA-256 and bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size


def check_files(folder: Path, manifest: Manifest, hashes: bool = True) -> None:
    """Compare every file of a model with its manifest; raises `UserError` that names the first one that differs.

    hashes: read the files; else their sizes alone are compared.
    """
    for name, (digest, size) in manifest.files.items():
        path = folder / name
        try:
            if path.is_symlink() or not path.is_file():
                raise UserError(f"{folder} is damaged: {name} is missing.")
            found = digest_of(path) if hashes else (digest, path.stat().st_size)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
        if found != (digest, size):
            what = "hash" if hashes else "size"
            raise UserError(f"{path} is damaged: its {what} is not the manifest's.")
