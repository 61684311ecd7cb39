"""experiments/gpu: the script runs here in its tiny mode; what fails is a row, and the exit code says so."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "experiments" / "gpu"


def load(name):
    """A module of the folder, which is no package."""
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


matrix, table = load("matrix"), load("table")


def test_script(tmp_path):
    environment = {**os.environ, "TINY": "1", "PYTHON": sys.executable, "OUT": str(tmp_path)}
    done = subprocess.run(
        ["bash", str(FOLDER / "run.sh")], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "matrix.json").read_text())
    assert {row["arithmetic"] for row in rows} == set(matrix.ARITHMETIC)
    assert {"muon", "adamw", "muon8bit", "galore"} <= {row["optimizer"] for row in rows}
    lines = [line for line in done.stdout.splitlines() if line.startswith("| tiny |")]
    assert len(lines) == len(rows)
    assert "| ternary int8 | muon | 128 |" in done.stdout


def test_full_matrix():
    cells = [cell for group in matrix.groups(tiny=False) for cell in group]
    assert {cell.preset for cell in cells} == {"tiny", "d20", "nano-125m", "d20-e3-full", "nano-1b"}
    for preset in matrix.PRESETS:
        for compiled in (True, False):
            mine = {cell.arithmetic for cell in cells if (cell.preset, cell.compiled) == (preset, compiled)}
            assert mine == set(matrix.ARITHMETIC)


def test_a_cell_that_fails_is_a_row():
    good = matrix.Cell("tiny", False, "float", "muon", 2, 1, True)
    cells = [matrix.Cell("tiny", False, "float", "mun", 2, 1, True), good]
    bad, well = matrix.run_group(cells, 60, time.monotonic() + 120)
    assert "did you mean" in bad["error"]
    assert well["tokens_per_second"] > 0


def test_a_cell_that_hangs_costs_itself_alone(tmp_path, monkeypatch):
    """A stand-in for the measuring process: it hangs at the first cell of its first call."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, os, pathlib, signal, sys, time\n"
        "cells, flag = json.loads(sys.argv[2]), pathlib.Path(__file__).with_suffix('.flag')\n"
        "if not flag.exists():\n"
        "    flag.touch(); signal.alarm(1); time.sleep(60)\n"
        "for cell in cells: print(json.dumps({'step_seconds': 1.0}))\n"
    )
    monkeypatch.setattr(matrix, "__file__", str(script))
    cells = [matrix.Cell("tiny", False, name, "muon", 2, 1, True) for name in ("float", "ternary")]
    hung, well = matrix.run_group(cells, 1, time.monotonic() + 60)
    assert hung["error"] == "took longer than 1 s"
    assert well["step_seconds"] == 1.0
    assert [row["error"] for row in matrix.run_group(cells, 1, time.monotonic())] == ["no time was left"] * 2


@pytest.mark.parametrize("broken", ["cell", "check"])
def test_table_of_failures(broken, tmp_path, capsys):
    cell = {"preset": "d20", "compiled": True, "arithmetic": "float", "optimizer": "muon"}
    fine = {"tokens_per_step": 100, "tokens_per_second": 50.0, "step_seconds": 2.0, "mfu": 0.5, "peak_gb": 1.0}
    fine |= {"device": "H100", "torch": "2.13", "precision": "bf16-mixed"}
    rows = [{**cell, **fine}, {**cell, "arithmetic": "ternary", **fine, "step_seconds": 3.0}]
    if broken == "cell":
        rows.append({**cell, "error": "out of memory"})
    else:
        (tmp_path / "loss.json").write_text("")
    (tmp_path / "matrix.json").write_text(json.dumps(rows))
    assert table.main(tmp_path) == 1
    out = capsys.readouterr().out
    assert "| d20 | compiled | ternary | muon | 100 | 50 | 3000.0 | 50.0% | 1.0 | 1.50x |" in out
    assert ("| FAILED: out of memory |" if broken == "cell" else "| loss | FAILED: no figures |") in out
