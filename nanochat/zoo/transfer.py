"""Models from and to other places: folders, whatever fsspec opens by URL, and the Hugging Face hub.

What arrives is believed only as far as its hashes go: it is written aside, never longer than its manifest says, and
takes its place when every file is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from nanochat.errors import UserError
from nanochat.export.gguf_reader import GGUFFile
from nanochat.files import replacing
from nanochat.zoo import store
from nanochat.zoo.manifest import LARGEST_MANIFEST, MANIFEST, Manifest, check_replace, decode

HUB = "hf:"
INDEX = "zoo.json"
"""in the folder above the models: name -> SHA-256 of each one's manifest"""
CHUNK = 1 << 20
CONNECT, READ = 10.0, 30.0
"""seconds to wait for a connection, and for the next bytes"""


class Place(Protocol):
    """Where a model's files can be read."""

    label: str

    def chunks(self, name: str) -> contextlib.AbstractContextManager[Iterator[bytes]]:
        """The bytes of a file, piece by piece."""
        ...


@contextlib.contextmanager
def readable(label: str, verb: str = "read") -> Iterator[None]:
    """Turn what goes wrong on the way to another place into one sentence."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        cause = f" ({error.__cause__})" if error.__cause__ is not None else ""  # fsspec hides a missing network so
        raise UserError(f"{label} is not there{cause}.") from error
    except ImportError as error:
        raise UserError(f"{label} needs another package: {error}") from error
    except TimeoutError as error:
        raise UserError(f"{label} cannot be {verb}: no answer in time; is there a network?") from error
    except Exception as error:  # each protocol has exceptions of its own
        lines = str(error).strip().splitlines()
        reason = lines[0].rstrip(".") if lines else type(error).__name__
        raise UserError(f"{label} cannot be {verb}: {reason}.") from error


class Folder:
    """A folder anywhere that fsspec reaches: a path, or a URL such as https://, s3:// or memory://."""

    def __init__(self, url: str) -> None:
        self.label = url.rstrip("/")
        if "::" in url:
            raise UserError(f"{url}: chained addresses and archives are not read; unpack the model first.")
        import fsspec

        options: dict[str, Any] = {}
        self.web = urlsplit(url).scheme in ("http", "https")
        if self.web:
            import aiohttp

            options["client_kwargs"] = {
                "timeout": aiohttp.ClientTimeout(total=None, sock_connect=CONNECT, sock_read=READ)
            }
        with readable(url):
            self.system, root = fsspec.core.url_to_fs(url, **options)
        self.root = root.rstrip("/")
        self.local = Path(self.root) if "file" in _protocols(self.system) else None

    @contextlib.contextmanager
    def chunks(self, name: str) -> Iterator[Iterator[bytes]]:
        """The bytes of a file, piece by piece; a web server's as they come, whatever length it names."""
        more = {"block_size": 0} if self.web else {}
        with self.system.open(f"{self.root}/{name}", "rb", **more) as file:
            yield iter(lambda: file.read(CHUNK), b"")


def _protocols(system: Any) -> tuple[str, ...]:
    return (system.protocol,) if isinstance(system.protocol, str) else tuple(system.protocol)


class Hub:
    """A repository on the Hugging Face hub, `hf:OWNER/NAME` or `hf:OWNER/NAME@REVISION`."""

    def __init__(self, address: str) -> None:
        self.label = address
        repository, _, revision = address.removeprefix(HUB).partition("@")
        self.repository, self.revision = repository, revision or "main"
        owner, slash, name = repository.partition("/")
        if not (owner and slash and name) or "/" in name:
            raise UserError(f"{address}: write hf:OWNER/NAME.")
        with readable(address):
            import huggingface_hub

            self.library = huggingface_hub

    @contextlib.contextmanager
    def chunks(self, name: str) -> Iterator[Iterator[bytes]]:
        """The bytes of a file, piece by piece."""
        url = self.library.hf_hub_url(self.repository, name, revision=self.revision)
        headers = self.library.utils.build_hf_headers()
        session = self.library.get_session()
        wait = (CONNECT, READ, READ, READ)
        with session.stream("GET", url, headers=headers, timeout=wait, follow_redirects=True) as answer:
            if answer.status_code in (401, 403, 404):
                raise UserError(f"{self.label} has no file {name}, or it is not yours to read.")
            answer.raise_for_status()
            yield answer.iter_bytes(CHUNK)


def open_place(source: str) -> Place:
    """The place that a source means; raises `UserError` for an address that cannot be one."""
    if source.startswith(store.SCHEME):
        return Folder(str(store.find(source.removeprefix(store.SCHEME))[0]))
    return Hub(source) if source.startswith(HUB) else Folder(source)


def read_small(place: Place, name: str) -> bytes:
    """A file of at most `LARGEST_MANIFEST` bytes."""
    content = b""
    with readable(f"{place.label}/{name}"), place.chunks(name) as pieces:
        for piece in pieces:
            content += piece
            if len(content) > LARGEST_MANIFEST:
                raise UserError(f"{place.label}/{name} has more than {LARGEST_MANIFEST:,} bytes; refused.")
    return content


def read_index(source: str) -> dict[str, str]:
    """The models that the folder `source` offers: name -> SHA-256 of the manifest."""
    place = Folder(source)
    try:
        values = json.loads(read_small(place, INDEX))
        models = values["models"]
        return {str(name): str(digest) for name, digest in models.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{place.label}/{INDEX} is not the index of a zoo.") from error


def get_model(
    source: str, into: Path, *, sha256: str | None = None, largest: int = 1 << 31, force: bool = False
) -> tuple[Path, Manifest]:
    """Fetch a model into `into/NAME`, checked, and return its folder and manifest.

    Args:
        source: the model's folder (a path or URL), `hf:OWNER/NAME`, or `zoo:NAME`.
        into: the zoo's folder; it is made when it is not there.
        sha256: of the manifest, as `zoo push` and `zoo list SOURCE` print it.
        largest: bytes that all files together may have.
        force: replace a model of this name.

    Raises:
        UserError: nothing there, no network, another hash, a name that leaves the folder, more bytes than named or
            allowed, or weights that are not a GGUF file. Nothing is left behind then.
    """
    place = open_place(source)
    content = read_small(place, MANIFEST)
    digest = hashlib.sha256(content).hexdigest()
    if sha256 is not None and digest != sha256.lower():
        raise UserError(f"{place.label}/{MANIFEST} has SHA-256 {digest}, not the one named by --sha256.")
    manifest = decode(content, f"{place.label}/{MANIFEST}")
    target = into / manifest.name
    check_replace(target, target.exists(), (target / MANIFEST).is_file(), force)
    if manifest.size > largest:
        raise UserError(f"{place.label} has {manifest.size:,} bytes, more than {largest:,}; --max-size allows more.")
    try:
        into.mkdir(parents=True, exist_ok=True)
        if manifest.size > shutil.disk_usage(into).free:
            raise UserError(f"{place.label} has {manifest.size:,} bytes, more than there is room for in {into}.")
        with replacing(target) as aside:
            aside.mkdir()
            for name in manifest.files:
                _download(place, name, manifest, aside / name)
            with GGUFFile(aside / manifest.weights):
                pass
            (aside / MANIFEST).write_bytes(content)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}.") from error
    return target, manifest


def _download(place: Place, name: str, manifest: Manifest, target: Path) -> None:
    digest, size = manifest.files[name]
    found, seen = hashlib.sha256(), 0
    label = f"{place.label}/{name}"
    with target.open("xb") as file, readable(label), place.chunks(name) as pieces:
        for piece in pieces:
            seen += len(piece)
            if seen > size:
                raise UserError(f"{label} is longer than the {size:,} bytes of its manifest; refused.")
            found.update(piece)
            file.write(piece)
    if seen < size:
        raise UserError(f"{label} ends after {seen:,} of {size:,} bytes.")
    if found.hexdigest() != digest:
        raise UserError(f"{label} is damaged: its hash is not the manifest's.")


def push_model(name: str, target: str, *, private: bool = False, force: bool = False) -> tuple[str, str]:
    """Copy a model of this machine to another place; returns the source to get it from, and its manifest's SHA-256.

    Args:
        name: of the model.
        target: the folder of a zoo (a path or URL), or `hf:OWNER/NAME`.
        private: make a repository on the hub that nobody else sees.
        force: replace a model of this name there.

    Raises:
        UserError: no such model here, one of this name there, or a place that cannot be written.
    """
    folder, manifest = store.find(name)
    digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    names = [*manifest.files, MANIFEST]  # the manifest last: without it there is no model
    if target.startswith(HUB):
        return _push_to_hub(folder, manifest, target, names, private, force), digest
    place = Folder(target)
    there = f"{place.root}/{name}"
    with readable(place.label, "written"):
        known = place.system.exists(there)
        check_replace(f"{place.label}/{name}", known, place.system.exists(f"{there}/{MANIFEST}"), force)
        if place.local is not None:
            place.local.mkdir(parents=True, exist_ok=True)
            with replacing(place.local / name) as aside:
                aside.mkdir()
                for file in names:
                    shutil.copyfile(folder / file, aside / file)
        else:
            _upload(place.system, folder, there, names, known)
        models = read_index(target) if place.system.exists(f"{place.root}/{INDEX}") else {}
        index = json.dumps({"models": {**models, name: digest}}, indent=1, sort_keys=True) + "\n"
        place.system.pipe_file(f"{place.root}/{INDEX}", index.encode())
    return f"{place.label}/{name}", digest


def _upload(system: Any, folder: Path, there: str, names: list[str], known: bool) -> None:
    try:
        if known:
            system.rm_file(f"{there}/{MANIFEST}")
        system.makedirs(there, exist_ok=True)
        for name in names:
            system.put_file(str(folder / name), f"{there}/{name}")
    except BaseException:
        with contextlib.suppress(Exception):
            system.rm(there, recursive=True)
        raise


def _push_to_hub(folder: Path, manifest: Manifest, target: str, names: list[str], private: bool, force: bool) -> str:
    hub = Hub(target)
    with readable(target, "written"):
        api = hub.library.HfApi()
        if not force and api.file_exists(hub.repository, MANIFEST):
            raise UserError(f"{target} holds a model; use --force to replace it.")
        api.create_repo(hub.repository, private=private, exist_ok=True)
        api.upload_folder(  # one commit: all of it or nothing
            repo_id=hub.repository,
            folder_path=folder,
            allow_patterns=names,
            commit_message=f"{manifest.name}, written by nanochat {manifest.version}",
        )
    return f"{HUB}{hub.repository}"
