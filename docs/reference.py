"""Write reference.md: every group, option and key of conf/, with default and meaning.

    python docs/reference.py            # writes docs/reference.md
    python docs/reference.py --check    # exit code 1 when the page is not what conf/ says

A meaning is the comment beside the key, else what the docstring of the class behind `_target_` says of it.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
PAGE = Path(__file__).with_name("reference.md")
HEAD = """\
# Reference

Every group, option and key, written by `python docs/reference.py` from `conf/` and the docstrings. Change a value with
`group.key=value`; `python train.py --help` prints the same of the configuration that it would run, and
`nanochat VERB --help` the options of the other commands.
"""
TITLES = {
    "": "Top of the configuration",
    "mtp": "Feature `+mtp=on`",
    "collider": "Feature `+collider=on`",
    "mhc": "Feature `+mhc=on`",
}
WHOLE = {"groups"}
"""mappings whose values stand in one row: their keys are names that a user chooses"""


def options() -> dict[str, list[Path]]:
    """The YAML files of each group; "" is the top."""
    found = {"": [CONF / "train.yaml"]}
    for folder in sorted(path for path in CONF.iterdir() if path.is_dir() and path.name != "hydra"):
        found[folder.name] = sorted(folder.rglob("*.yaml"))
    return found


def head_of(text: str) -> str:
    """The comment at the top of a file, without Hydra's package line."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            lines.append(line.lstrip("# "))
    return " ".join(lines)


def comment_of(line: str) -> str:
    """What follows a `#` outside of quotes."""
    match = re.match(r"""(?:[^#'"]|'[^']*'|"[^"]*"|(?<=\S)[#'"])*?\s\#\s?(.*)$""", line)
    return match[1].strip() if match else ""


def rows(text: str, documented: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """(key, default, meaning) of each value of a file, keys dotted."""
    node, lines = yaml.compose(text), text.splitlines()
    if isinstance(node, yaml.MappingNode):
        yield from _rows(node, lines, "", documented)


def _rows(node: yaml.MappingNode, lines: list[str], prefix: str, documented: dict[str, str]) -> Iterator[Any]:
    docs = documented | (_documented(target) if (target := _target(node)) else {})
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        meaning = comment_of(lines[key.start_mark.line]) or docs.get(key.value, "")
        if name in ("defaults", "hydra") or key.value == "_target_" or key.value == "_partial_":
            continue
        if isinstance(value, yaml.MappingNode) and value.value and key.value not in WHOLE and not value.flow_style:
            if meaning:
                yield name, "", meaning
            yield from _rows(value, lines, f"{name}.", {})
        else:
            yield name, _default(value), meaning


def _target(node: yaml.MappingNode) -> str | None:
    return next((value.value for key, value in node.value if key.value == "_target_"), None)


def _default(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return node.value or ("null" if node.tag.endswith("null") else '""')
    if isinstance(node, yaml.SequenceNode):
        return "[" + ", ".join(_default(item) for item in node.value) + "]"
    assert isinstance(node, yaml.MappingNode)
    return "{" + ", ".join(f"{key.value}: {_default(value)}" for key, value in node.value) + "}"


def _documented(target: str) -> dict[str, str]:
    """What the class behind a `_target_` says of its arguments: attribute docstrings, and `Args:`."""
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
        tree = ast.parse(textwrap.dedent(inspect.getsource(found)))
    except (ImportError, AttributeError, OSError, TypeError, SyntaxError):
        return {}
    docs: dict[str, str] = {}
    if not target.startswith("nanochat."):
        return docs
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            docs[field.target.id] = str(ast.literal_eval(text.value))
    arguments = inspect.cleandoc(found.__doc__ or "").partition("Args:")[2]
    for match in re.finditer(r"^    (\w+): (.+(?:\n     +.+)*)", arguments, re.MULTILINE):
        docs.setdefault(match[1], " ".join(match[2].split()))
    return docs


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for group, files in options().items():
        parts.append(f"## {TITLES.get(group, f'`{group}=`')}\n")
        for path in files:
            text = path.read_text(encoding="utf-8")
            if group:
                option = path.relative_to(CONF / group).with_suffix("").as_posix()
                parts.append(f"### `{'+' if group in TITLES else ''}{group}={option}`\n")
            parts.append(f"{_cell(head_of(text), escape=False)}\n")
            prefix = "" if not group or "@package _global_" in text else f"{group}."
            table = [(f"{prefix}{key}", default, meaning) for key, default, meaning in rows(text, {})]
            if table:
                parts.append("| key | default | |\n|---|---|---|")
                parts += [f"| `{key}` | {_code(default)} | {_cell(meaning)} |" for key, default, meaning in table]
                parts.append("")
    return "\n".join(parts)


def _code(text: str) -> str:
    return "`" + text.replace("|", "\\|") + "`" if text else ""


def _cell(text: str, escape: bool = True) -> str:
    text = " ".join(text.split())
    return text.replace("|", "\\|").replace("<", "&lt;") if escape else text


def main() -> int:
    """Write the page, or compare it."""
    if "--check" in sys.argv[1:]:
        if PAGE.read_text(encoding="utf-8") == page():
            return 0
        print("docs/reference.md is stale: run `python docs/reference.py`", file=sys.stderr)
        return 1
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
