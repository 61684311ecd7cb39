"""`nanochat data`: prepare a corpus and say what is in it."""

from __future__ import annotations

import json

from nanochat.config.compose import compose
from nanochat.console import Parser
from nanochat.data import DataModule


def parser() -> Parser:
    """The command's options."""
    options = Parser("data", __doc__)
    options.add_argument("overrides", nargs="*", help="as for training, such as data=text data.paths=[my.txt]")
    return options


def main(argv: list[str]) -> int:
    """Prepare, or find in the cache, what a run with these options would read; returns the exit code."""
    options = parser().parse_intermixed_args(argv)

    from hydra.utils import instantiate

    cfg = compose(options.overrides)
    data: DataModule = instantiate(cfg["data"], tokenizer=instantiate(cfg["tokenizer"]))
    data.setup()
    if options.json:
        print(json.dumps({**data.header, "folder": data.folder}))
        return 0
    print(data.describe())
    if data.folder is not None:
        print(f"in {data.folder}")
        rates = ", ".join(f"{name} {rate:.3f}" for name, rate in data.compression.items())
        print(f"validated on {data.val_bytes:,} bytes of text; bits per byte: {rates}")
        skipped = data.header["skipped"]
        for name, reason in skipped["named"].items():
            print(f"skipped {name}: {reason}")
        if skipped["count"] > len(skipped["named"]):
            print(f"skipped {skipped['count'] - len(skipped['named'])} more")
        if skipped.get("empty"):  # not in the header of an earlier version
            print(f"{skipped['empty']} empty files")
    return 0
