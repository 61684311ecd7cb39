"""MkDocs hooks: the studies in experiments/ as pages of the site, and links that hold on disk and in the site.

A page links to files as they lie in the repository. Links to experiments/ become links between pages; links to other
files of the repository become their names, since the site does not hold them.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
log = logging.getLogger("mkdocs.hooks")


def on_config(config):
    """Put pages that the navigation does not name under a heading of their own."""
    named = re.findall(r"'([\w./-]+\.md)'", repr(config.nav))
    others = sorted(path.name for path in Path(config.docs_dir).glob("*.md") if path.name not in named)
    if others:
        config.nav = [*config.nav, {"More": others}]
    return config


def on_files(files, config):
    """Add experiments/**/*.md and their pictures."""
    for path in sorted((ROOT / "experiments").rglob("*")):
        if path.suffix in (".md", ".png"):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point every relative link at where its target lies in the site."""
    here = page.file.src_uri
    place = here if here.startswith("experiments/") else f"docs/{here}"

    def replaced(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        if re.match(r"[a-z]+:", target):
            return match[0]
        there = posixpath.normpath(posixpath.join(posixpath.dirname(place), target))
        inside = there.removeprefix("docs/") if there.startswith("docs/") else there
        if files.get_file_from_path(inside) is not None:
            return f"[{text}]({posixpath.relpath(inside, posixpath.dirname(here) or '.')}{anchor})"
        if (ROOT / there).exists():
            return text if text.strip("`") == there else f"{text} (`{there}`)"
        log.warning("%s links to %s, which is not in the repository", here, target)
        return match[0]

    return LINK.sub(replaced, markdown)
