"""The running Python's own library without its tests: some 12 MB of real text on every machine."""

from __future__ import annotations

import sysconfig

from nanochat.data.sources.base import NOT_SOURCE
from nanochat.data.sources.text import TextFiles


class StandardLibrary(TextFiles):
    """Its modules, a document each."""

    kind = "stdlib"
    excluded = NOT_SOURCE | {"test", "tests", "idle_test", "site-packages", "dist-packages"}

    def __init__(self) -> None:
        super().__init__([sysconfig.get_paths()["stdlib"]], "data.corpus", extensions=[".py"])


CORPUS = StandardLibrary
