"""`nanochat serve`: OpenAI's API and a chat page for trained models."""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from nanochat.console import Parser, count, count_or_zero, one_of, seconds
from nanochat.errors import UserError
from nanochat.inference.options import pick_device
from nanochat.serve.models import BACKENDS, SPECULATE, Settings, load_model
from nanochat.zoo.store import RUN_HELP

LOOPBACK = ("127.0.0.1", "localhost", "::1")


LLAMA_FIRST = "llama.cpp where it is installed and can run the model, else torch"


def add_loading(options: argparse.ArgumentParser, slots: int | None, auto: str = LLAMA_FIRST) -> None:
    """The options of `Settings`.

    slots: default of `--parallel`, None for one slot and no such option; auto: what the command takes without
    `--backend`.
    """
    options.add_argument(
        "--backend",
        type=one_of(BACKENDS),
        default="auto",
        help=f"torch, llama.cpp, or auto: {auto} (auto)",
    )
    if slots is None:
        options.set_defaults(parallel=1)
    else:
        options.add_argument("--parallel", type=count, default=slots, help=f"answers written at once ({slots})")
    options.add_argument("--context", type=count, help="tokens of each of them (the model's own)")
    options.add_argument(
        "--speculate",
        type=one_of(SPECULATE),
        default="auto",
        help="draft with the heads of +mtp=on, verify with the network: on, off, or auto: where it pays (auto)",
    )
    options.add_argument("--checkpoint", default="last", metavar="STEP", help="of a run: last, or a step that was kept")
    options.add_argument("--device", default="auto", help="cpu, or cuda or mps with the torch backend (auto)")


def settings_of(options: argparse.Namespace) -> Settings:
    """The `Settings` that the options of `add_loading` describe; raises `UserError`.

    What is asked for and only the torch backend has makes `--backend auto` mean that one.
    """
    device, backend = pick_device(options.device), options.backend
    needs = [f"--device {options.device}"] if options.device != "auto" and device.type != "cpu" else []
    needs += ["--speculate on"] if options.speculate == "on" else []
    if needs and backend == "llama.cpp":
        raise UserError(f"{needs[0]} needs the torch backend, not --backend llama.cpp.")
    return Settings(
        "torch" if needs else backend,
        options.parallel,
        options.context,
        device,
        options.checkpoint,
        speculate=options.speculate,
    )


def parser() -> Parser:
    """Options of `nanochat serve`."""
    options = Parser("serve", "Serve trained models: a chat page, and the API of OpenAI.", as_json=False)
    options.add_argument("models", nargs="+", metavar="RUN_OR_FILE", help=RUN_HELP)
    options.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine alone)")
    options.add_argument("--port", type=count_or_zero, default=8000, help="0 takes a free one (8000)")
    options.add_argument(
        "--alias", action="append", default=[], metavar="NAME", help="name of a model in the API, in their order"
    )
    options.add_argument("--api-key-file", type=Path, help="file of keys, one a line; requests must bring one")
    options.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="web page that may call, as https://a.example",
    )
    add_loading(options, 4)
    options.add_argument("--queue", type=count_or_zero, default=256, help="requests that may wait (256)")
    options.add_argument("--timeout", type=seconds, default=600.0, help="seconds for an answer (600)")
    options.add_argument("--max-body", type=count, default=4 << 20, help="bytes of a request (4194304)")
    options.add_argument("--grace", type=seconds, default=30.0, help="seconds for running answers at the end (30)")
    options.add_argument("--log-requests", action="store_true", help="print a line for each request")
    return options


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; raises `UserError` when the address or the port cannot be had."""
    if port > 65535:
        raise UserError(f"--port {port} must be at most 65535.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; choose another --port."
        ) from error
    return listener


def names_of(models: Sequence[str], aliases: Sequence[str]) -> list[str | None]:
    """A name for each model, None for its own; raises `UserError` for too many aliases."""
    if len(aliases) > len(models):
        raise UserError(f"--alias is given {len(aliases)} times for {len(models)} models.")
    return [*aliases, *[None] * (len(models) - len(aliases))]


def main(argv: Sequence[str]) -> int:
    """Run `nanochat serve` until it is interrupted; raises `UserError` for what the user can mend."""
    options = parser().parse_args(argv)
    try:
        import uvicorn

        from nanochat.serve.app import Server, ServerSettings, create_app
        from nanochat.serve.limits import read_keys
    except ImportError as error:
        raise UserError(f"serving needs the extra packages: pip install 'nanochat[serve]' ({error}).") from error
    settings, names = settings_of(options), names_of(options.models, options.alias)
    keys = read_keys(options.api_key_file) if options.api_key_file else []
    listener = listen(options.host, options.port)
    host, port = listener.getsockname()[:2]

    def load():
        models = [load_model(path, settings, name) for path, name in zip(options.models, names, strict=True)]
        repeated = {model.name for model in models if sum(other.name == model.name for other in models) > 1}
        if repeated:
            raise UserError(f"two models are called {repeated.pop()}: give them names with --alias.")
        for model in models:
            print(
                f"{model.name}: {model.source} with {model.backend.name}, {model.backend.slots} x "
                f"{model.backend.context} tokens{'' if model.is_chat else ', a base model: it continues text'}",
                file=sys.stderr,
            )
            if model.note:
                print(f"  note: {model.note}", file=sys.stderr)
        shown = f"[{host}]" if ":" in host else host
        print(f"nanochat is at http://{shown}:{port}", file=sys.stderr, flush=True)
        return models

    server = Server(
        load,
        ServerSettings(
            keys,
            local=options.host in LOOPBACK,
            origins=options.cors_origin,
            max_body=options.max_body,
            timeout=options.timeout,
            max_waiting=options.queue,
            grace=options.grace,
        ),
    )
    web = uvicorn.Server(
        uvicorn.Config(
            create_app(server),
            log_level="info" if options.log_requests else "warning",
            access_log=options.log_requests,
            server_header=False,
            timeout_graceful_shutdown=int(options.grace) + 1,
            ws="none",
        )
    )
    server.on_failure = lambda: setattr(web, "should_exit", True)
    web.run(sockets=[listener])
    if server.failure is not None:
        raise server.failure
    return 0
