"""What has to be decided before torch is imported."""

from __future__ import annotations

import os
import platform


def prepare_environment() -> None:
    """Let torch's CPU allocator use transparent huge pages; the variable is read when torch is loaded."""
    if platform.system() == "Linux":
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
