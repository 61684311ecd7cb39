"""`nanochat bench NAME`."""

from __future__ import annotations

import importlib
import pkgutil

import nanochat.bench
from nanochat.errors import UserError, did_you_mean

NOT_BENCHES = {"cli", "measure", "peer_worker", "peers"}


def main(argv: list[str]) -> int:
    """Run the bench that is named first; each is a module of this package with `main(argv)`."""
    modules = {module.name for module in pkgutil.iter_modules(nanochat.bench.__path__)} - NOT_BENCHES
    names = sorted(name.replace("_", "-") for name in modules)
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: nanochat bench {{{','.join(names)}}} [options]")
        return 0
    if argv[0] not in names:
        raise UserError(f"there is no bench {argv[0]!r}{did_you_mean(argv[0], names)}")
    return importlib.import_module(f"nanochat.bench.{argv[0].replace('-', '_')}").main(argv[1:])
