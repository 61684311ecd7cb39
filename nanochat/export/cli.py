"""`nanochat export`, `nanochat verify`, `nanochat import`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nanochat.console import Parser, one_of
from nanochat.errors import UserError
from nanochat.export.gguf import ExportReport, check_target, default_type, export_gguf
from nanochat.export.gguf_tensors import OWN
from nanochat.export.huggingface import export_huggingface
from nanochat.export.hyper_connections import records_of, write_mhc
from nanochat.export.open_run import open_run
from nanochat.export.packing import EMBEDDING_TYPES, TYPES
from nanochat.export.read_back import import_export
from nanochat.export.verify import verify
from nanochat.zoo.store import RUN_HELP, located

_PROGRAMS = {
    "gguf": "runs in stock llama.cpp and what is built on it (Ollama, LM Studio, ...)",
    "nanochat": "runs in nanochat only; any GGUF tool can read its tensors",
    "safetensors": "runs in transformers and what reads its folders",
}


def export_parser() -> Parser:
    """Options of `nanochat export`."""
    options = Parser("export", "Write a trained model for other programs.", as_json=False)
    options.add_argument("run", help=RUN_HELP)
    options.add_argument("--to", type=one_of(_PROGRAMS), default="gguf", help=f"format: {', '.join(_PROGRAMS)} (gguf)")
    options.add_argument(
        "--type",
        default="auto",
        help=f"of the matrices: auto, {', '.join(TYPES)}; auto is the smallest that fits (tq2_0, else q2_0, else q4_0; "
        "f16 for float models); for a GPU take q2_0, since llama.cpp has no CUDA kernels for tq2_0 and tq1_0",
    )
    options.add_argument("--embedding-type", help=f"of the embedding and output matrix: {', '.join(EMBEDDING_TYPES)}")
    options.add_argument("--no-mtp", action="store_true", help="leave the heads of multi-token prediction out")
    options.add_argument("--out", type=Path, help="file or folder to write (beside the run's model.json)")
    options.add_argument("--force", action="store_true", help="replace an existing file")
    options.add_argument("--name", help="name for the model card (the run's task_name)")
    options.add_argument("--license", help="SPDX identifier for the model card")
    options.add_argument("--checkpoint", default="last", metavar="STEP", help="last, or a step that was kept")
    return options


def export_main(argv: Sequence[str]) -> int:
    """Run `nanochat export`; raises `UserError` for what the user can mend."""
    options = export_parser().parse_args(argv)
    run = open_run(options.run, options.checkpoint)
    home = Path() if run.checkpoint.suffix == ".gguf" else run.folder
    if options.to == "safetensors":
        if options.embedding_type:
            raise UserError("--embedding-type is for GGUF files; safetensors has one type, --type f32 or f16.")
        report = export_huggingface(
            run,
            options.out or home / "huggingface",
            "f32" if options.type == "auto" else options.type,
            force=options.force,
        )
    else:
        kind = default_type(run.config) if options.type == "auto" else options.type
        own = options.to == "nanochat"
        stem = f"{OWN}-{kind}" if own else f"model-{kind}"
        report = export_gguf(
            run,
            options.out or home / f"{stem}.gguf",
            kind,
            options.embedding_type,
            own=own,
            mtp=not options.no_mtp,
            force=options.force,
            name=options.name,
            licence=options.license,
        )
    _print_report(report, _PROGRAMS[options.to])
    if options.to == "nanochat" and run.config.streams > 1 and run.config.stream_maps == "static":
        sidecar = report.path.with_suffix(".mhc")
        check_target(sidecar, options.force)
        size = write_mhc(sidecar, records_of(run.gpt), run.config.streams)
        print(f"{sidecar}: the maps of the {run.config.streams} residual streams once more, {size:,} bytes")
    return 0


def _print_report(report: ExportReport, programs: str) -> None:
    share = report.size / report.f16_size
    print(f"{report.path}: {report.architecture}, {report.type}, {report.size:,} bytes ({share:.2f} of float16)")
    print(f"  {programs}")
    for note in report.notes:
        print(f"  note: {note}")


def verify_parser() -> Parser:
    """Options of `nanochat verify`."""
    options = Parser("verify", "Check an exported file: structure, hash, and the same logits.", as_json=False)
    options.add_argument("file", type=Path, help="GGUF file, zoo:NAME, or safetensors folder")
    options.add_argument("--run", help="compare with this run (or zoo:NAME)")
    options.add_argument("--checkpoint", default="last", metavar="STEP", help="of the run: last, or a kept step")
    options.add_argument("--tensors", action="store_true", help="list every tensor")
    return options


def verify_main(argv: Sequence[str]) -> int:
    """Run `nanochat verify`: 0 when everything holds, 1 when a comparison fails."""
    options = verify_parser().parse_args(argv)
    run = open_run(options.run, options.checkpoint) if options.run else None
    found = verify(options.file, run)
    print(f"{found.path}: {found.description}")
    print(f"  SHA-256 {found.sha256}")
    if options.tensors:
        for name, kind, shape in found.tensors:
            print(f"  {name:32} {kind:6} {' x '.join(map(str, shape))}")
    print("  ok    structure")
    for comparison in found.comparisons:
        print(f"  {comparison}")
    for note in found.notes:
        print(f"  note: {note}")
    return 0 if found.passed else 1


def import_parser() -> Parser:
    """Options of `nanochat import`."""
    options = Parser("import", "Make a run folder from a file that nanochat exported.", as_json=False)
    options.add_argument("file", type=Path, help="GGUF file, zoo:NAME, or safetensors folder")
    options.add_argument("--out", type=Path, help="run folder to make (outputs/imported-NAME)")
    options.add_argument("--force", action="store_true", help="replace an earlier import")
    return options


def import_main(argv: Sequence[str]) -> int:
    """Run `nanochat import`; raises `UserError` for what the user can mend."""
    options = import_parser().parse_args(argv)
    file = located(options.file)
    out = options.out or Path("outputs") / f"imported-{file.resolve().stem}"
    print(f"{import_export(file, out, force=options.force)}: use it as RUN, as in nanochat generate {out}")
    return 0
