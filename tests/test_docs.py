"""The pages of docs/: commands parse, links hold, the reference is fresh, figures are those of the studies."""

from __future__ import annotations

import decimal
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.commands import ROOT, check_command, commands_in

PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "CONTRIBUTING.md", ROOT / "experiments" / "README.md"])
NOT_RUN = ("extending.md", "reference.md")  # tests/test_extending.py runs the first; the second has none
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = {
    command: page.name
    for page in PAGES
    if page.name not in NOT_RUN
    for command in commands_in(page.read_text(encoding="utf-8"))
    if command not in README  # those have a test of their own
}
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)\s]*)?\)")
FIGURE = re.compile(r"([+-]\d\.\d+) ± (\d\.\d+)")


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_command(command, tmp_path, monkeypatch):
    check_command(command, tmp_path, monkeypatch, most=1)


def test_there_are_commands():
    assert len(COMMANDS) >= 40


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def reference():
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_fresh():
    module = reference()
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run `python docs/reference.py`"


def test_the_reference_has_every_key():
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    for path in (ROOT / "conf").rglob("*.yaml"):
        group = path.relative_to(ROOT / "conf").parts[0]
        if group in ("hydra", "resume.yaml"):
            continue
        content = path.read_text(encoding="utf-8")
        prefix = "" if group == "train.yaml" or "@package _global_" in content else f"{group}."
        for key in (yaml.safe_load(content) or {}).keys() - {"defaults", "hydra", "_target_", "_partial_"}:
            assert f"`{prefix}{key}`" in text or f"`{prefix}{key}." in text, f"{path}: {key}"


@pytest.mark.parametrize(
    ("line", "comment"),
    [
        ("lr: 0.02 # of the matrices", "of the matrices"),
        ("a: '# no' # yes", "yes"),
        ('a: "x # no"', ""),
        ("a: b#c", ""),
        ("a: 1", ""),
    ],
)
def test_comments_are_read(line, comment):
    assert reference().comment_of(line) == comment


def shown(value: float) -> decimal.Decimal:
    """Three decimals, halves away from zero, as the tables round."""
    return decimal.Decimal(str(value)).quantize(decimal.Decimal("0.001"), decimal.ROUND_HALF_UP)


def studies() -> dict[Path, dict]:
    return {path.parent: json.loads(path.read_text()) for path in (ROOT / "experiments").glob("*/figures.json")}


def rounded(figures: dict) -> set[tuple[str, str]]:
    return {(f"{shown(f['value']):+}", str(shown(f["half"]))) for f in figures["differences"]}


def test_figures_are_those_of_the_studies_tables():
    assert len(studies()) >= 4
    for folder, figures in studies().items():
        text = (folder / "README.md").read_text(encoding="utf-8")
        for figure in figures["differences"]:
            assert f"{figure['value']:+.4f} ± {figure['half']:.4f}" in text, (folder.name, figure)
        for figure in figures.get("shares", []):
            assert f"{figure['value']:.0%}" in text, (folder.name, figure)


def test_the_figures_of_readme_are_those_of_the_studies():
    table = README[README.index("| technique | bits per byte | verdict |") :].split("\n\n")[0]
    known, count = set(), 0
    for row in table.splitlines()[2:]:
        for folder in re.findall(r"\(experiments/([^/)]+)/README\.md\)", row):
            figures = studies().get(ROOT / "experiments" / folder)
            assert figures is not None, f"experiments/{folder} has no figures.json"
            known = rounded(figures)  # rows below without a link belong to the same study
            for share in figures.get("shares", []):
                assert f"{share['value']:.0%}" in row, share
        for figure in FIGURE.findall(row):
            assert figure in known, f"README: {' ± '.join(figure)} does not stand in that study's figures.json"
            count += 1
    assert count >= 12


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.parent.name in ("techniques", "experiments") or page.name == "original-claims.md"],
    ids=lambda page: page.name,
)
def test_the_figures_of_pages_are_those_of_the_studies(page):
    known = {figure for figures in studies().values() for figure in rounded(figures)}
    for figure in FIGURE.findall(page.read_text(encoding="utf-8")):
        assert figure in known, f"{page.name}: {' ± '.join(figure)} stands in no figures.json"


def test_the_site_is_built_and_its_links_hold(tmp_path):
    pytest.importorskip("mkdocs", reason="pip install 'nanochat[docs]'")
    pytest.importorskip("material", reason="pip install 'nanochat[docs]'")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "experiments" / "2026-11-23-mtp" / "index.html").read_text(encoding="utf-8")
    assert "Does multi-token prediction pay?" in page
    foreign = re.compile(r'<(?:script|link|img)[^>]+(?:src|href)="https?://')
    for path in (tmp_path / "site").rglob("*.html"):
        assert not foreign.search(path.read_text(encoding="utf-8")), path
