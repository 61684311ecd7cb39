"""`nanochat bench export`: size of the exported file, and speed in llama.cpp, by tensor type."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from nanochat.bench.measure import clock, network, report
from nanochat.checkpoint import Run
from nanochat.console import Parser, count
from nanochat.data.tokenizer import Byte
from nanochat.errors import UserError
from nanochat.export.gguf import check_type, export_gguf
from nanochat.export.llama_cpp import RELEASE, LlamaModel, fetch
from nanochat.export.open_run import open_run
from nanochat.export.packing import TYPES
from nanochat.inference.engine import Decoder, inference_copy
from nanochat.model import GPT
from nanochat.reports.table import show
from nanochat.zoo.store import SCHEME

PROMPT = 64  # tokens


def random_run(preset: str, folder: Path) -> Run:
    """An untrained network of a preset's shape: sizes and speeds do not depend on what the weights say."""
    config = network(preset, zero_init=False)
    Byte().build().save(folder / "tokenizer.json")
    return Run(folder, folder / "none.ckpt", GPT(config, seed=0), config)


def speed(path: Path, vocabulary: int, decoded: int, threads: int) -> tuple[float, float]:
    """Tokens per second of reading a prompt and of writing, in llama.cpp with its own defaults."""
    tokens = torch.randint(vocabulary, (PROMPT + decoded,), generator=torch.Generator().manual_seed(0)).tolist()
    with LlamaModel(path, context=PROMPT + decoded, threads=threads, float_cache=False) as model:
        model.logits(tokens[:PROMPT])  # warm-up
        start = clock()
        model.logits(tokens[:PROMPT])
        middle = clock()
        for index in range(PROMPT, PROMPT + decoded):
            model.feed(tokens[index : index + 1], index)
        return PROMPT / (middle - start), decoded / (clock() - middle)


def own_speed(run: Run, decoded: int) -> tuple[float, float]:
    """The same of nanochat's engine."""
    decoder = Decoder(inference_copy(run.gpt), capacity=PROMPT + decoded)
    tokens = torch.randint(run.config.vocab_size, (1, PROMPT + decoded), generator=torch.Generator().manual_seed(0))
    decoder.feed(tokens[:, :PROMPT])
    decoder.truncate()
    start = clock()
    decoder.feed(tokens[:, :PROMPT])
    middle = clock()
    for index in range(PROMPT, PROMPT + decoded):
        decoder.feed(tokens[:, index : index + 1])
    return PROMPT / (middle - start), decoded / (clock() - middle)


def main(argv: list[str]) -> int:
    """Print the table."""
    parser = Parser("bench export", __doc__)
    parser.add_argument("models", nargs="*", default=["tiny", "d20", "nano-125m"], help="presets, runs, zoo:NAME")
    parser.add_argument("--tokens", type=count, default=64, help="tokens to write (64)")
    parser.add_argument("--threads", type=count, default=1, help="of either program (1)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    fetch()
    figures: dict[str, Any] = {}
    for name in options.models:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            run = open_run(name) if Path(name).exists() or name.startswith(SCHEME) else random_run(name, folder)
            decoded = min(options.tokens, run.config.seq_len - PROMPT)
            if decoded < 1:
                raise UserError(f"{name} has a context of {run.config.seq_len} tokens; {PROMPT + 1} are needed.")
            rows: dict[str, dict[str, float]] = {}
            for kind in reversed(TYPES):
                try:
                    check_type(run.config, kind, "q8_0")
                except UserError:
                    continue
                written = export_gguf(run, folder / f"{kind}.gguf", kind, mtp=False)
                read, write = speed(written.path, run.config.vocab_size, decoded, options.threads)
                rows[kind] = {"bytes": written.size, "read": read, "write": write}
                written.path.unlink()
            read, write = own_speed(run, decoded)
        for row in rows.values():
            row["of_f16"] = row["bytes"] / rows["f16"]["bytes"]
        figures[name] = {**rows, "nanochat": {"read": read, "write": write}}
        table = [[k, r["bytes"] / 1e6, r["of_f16"], r["read"], r["write"]] for k, r in rows.items()]
        if not options.json:
            show(
                f"{name}: GGUF files in llama.cpp {RELEASE}, {options.threads} thread(s)",
                ["type", "MB", "of f16", "read tokens/s", "write tokens/s"],
                [*table, ["nanochat's own engine", "", "", read, write]],
                [f"read: {PROMPT} tokens at once; write: {decoded} tokens one by one."],
            )
    report(figures, options.json)
    return 0
