"""What tests of several rooms share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser


LONG = (
    "test_compare", "test_every_option", "test_extending", "test_resume", "test_sweep", "test_search", "test_lock",
    "test_kills", "test_async_checkpoint", "test_launcher", "test_agreement", "test_wandb", "test_server",
    "test_commands", "test_prepare", "test_docs",
)  # fmt: skip
"""files that train or start processes: they come first, so that no worker is left with one at the end"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONG)  # stable: files stay together


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium; skipped only where it is not installed, and never in CI."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("there is no Chromium: make browser installs it.")
        pytest.skip("NO CHROMIUM, THE PAGES ARE NOT PROVEN HERE: make browser installs it.")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
