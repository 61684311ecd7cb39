"""The command `nanochat`: one verb each, imported when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from nanochat.environment import prepare_environment
from nanochat.errors import UserError, did_you_mean, print_error

VERBS: dict[str, tuple[str, str]] = {
    "train": ("nanochat.launch:main", "train a model, or go on with a run: --resume RUN"),
    "runs": ("nanochat.runs:main", "all runs below a folder: state, step, loss, speed, time left, disk"),
    "compare": ("nanochat.studies.cli:main", "does a technique pay here? matched runs, paired seeds, one table"),
    "report": ("nanochat.studies.report:main", "one page about runs, a sweep or a comparison: verdict, table, curves"),
    "generate": ("nanochat.serve.generate:main", "text from a trained model"),
    "serve": ("nanochat.serve.cli:main", "a chat page and an OpenAI-compatible server for trained models"),
    "chat": ("nanochat.serve.chat:main", "talk to a trained model in the terminal"),
    "export": ("nanochat.export.cli:export_main", "write a trained model for other programs, such as llama.cpp"),
    "verify": ("nanochat.export.cli:verify_main", "compare an exported file with its run"),
    "import": ("nanochat.export.cli:import_main", "read an exported file back as a run"),
    "data": ("nanochat.data.cli:main", "prepare a corpus and say what is in it"),
    "zoo": ("nanochat.zoo.cli:main", "trained models with card and hashes: list, get, add, push, card"),
    "params": ("nanochat.params:main", "parameters and memory of a model, by part"),
    "wandb": ("nanochat.studies.wandb_commands:main", "Weights & Biases: sweeps, dashboards, a local page of them"),
    "bench": ("nanochat.bench.cli:main", "the measurements behind the figures of the README"),
    "validate": (
        "nanochat.validate:main",
        "once the whole way: prepare, train, kill, resume, export, verify",
    ),
    "doctor": ("nanochat.doctor:main", "versions, device, what works, and a training smoke test"),
}
"""verb -> (module:function, what it does); the function takes the other arguments and returns an exit code or None"""


def usage() -> str:
    """What `nanochat --help` prints."""
    lines = [f"  {verb:<10} {text}" for verb, (_, text) in VERBS.items()]
    return "usage: nanochat VERB ...   (nanochat VERB --help)\n\n" + "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb that comes first.

    Returns:
        0 done, 2 the user's mistake (one sentence on stderr), 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] in ("-V", "--version", "version"):
        from nanochat import __version__

        print(f"nanochat {__version__}")
        return 0
    verb, *rest = words
    try:
        if verb not in VERBS:
            raise UserError(f"there is no verb {verb!r}{did_you_mean(verb, VERBS)}")
        prepare_environment()
        module, function = VERBS[verb][0].split(":")
        return getattr(importlib.import_module(module), function)(rest) or 0
    except UserError as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has left, as in `nanochat params | head`
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
