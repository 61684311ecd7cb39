"""`nanochat wandb`: sweeps, dashboards and files of Weights & Biases.

nanochat wandb sweep model=tiny optim=adamw,muon 'optim.lr=tag(log,interval(0.003,0.1))' --out sweep.yaml
nanochat wandb dashboard PROJECT --entity TEAM         the project's workspace and report
nanochat wandb dashboard --offline RUN_OR_SWEEP...     the same panels as a local page, without an account
nanochat wandb log RUN run.gguf                        files made of a run, with its checkpoint as their input
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from nanochat.console import Parser, count
from nanochat.errors import UserError, did_you_mean
from nanochat.files import shown, write_text
from nanochat.reports import wandb_account, workspace
from nanochat.studies.dashboard import dashboard
from nanochat.studies.evidence import read_runs
from nanochat.studies.wandb_sweep import METHODS, sweep

TIMEOUT = 10.0
"""seconds to wait for the server's first answer"""


def main(argv: Sequence[str]) -> int:
    """Run the command that comes first; returns the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    verb, *rest = argv
    if verb not in COMMANDS:
        raise UserError(f"nanochat wandb has no command {verb!r}{did_you_mean(verb, COMMANDS)}")
    return COMMANDS[verb](rest)


def sweep_main(argv: Sequence[str]) -> int:
    """Write a sweep's YAML, or print it."""
    options = Parser("wandb sweep", sweep.__doc__, as_json=False)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as behind train.py -m")
    options.add_argument("--out", type=Path, metavar="FILE", help="write it here (printed)")
    options.add_argument("--method", choices=METHODS, help="bayes where there is an interval, else grid")
    options.add_argument("--metric", default="val/bpb", help="what bayes looks at (val/bpb)")
    options.add_argument(
        "--goal", choices=("minimize", "maximize"), default="minimize", help="of the metric (minimize)"
    )
    options.add_argument("--name", help="of the sweep")
    options.add_argument("--project", default="nanochat", help="of W&B (nanochat)")
    options.add_argument("--runs", type=count, help="after which the sweep ends")
    given = options.parse_intermixed_args(argv)
    content = sweep(given.overrides, given.method, given.metric, given.goal, given.name, given.project, given.runs)
    text = yaml.safe_dump(content, sort_keys=False, width=1000)
    if given.out is None:
        print(text, end="")
        return 0
    write_text(given.out, text, "--out")
    print(f"wandb sweep {shown(given.out)}     # makes it; then on each machine: wandb agent ENTITY/PROJECT/SWEEP_ID")
    return 0


def dashboard_main(argv: Sequence[str]) -> int:
    """Make the dashboard, in an account or as a page."""
    options = Parser("wandb dashboard", None, as_json=False)
    options.add_argument("project", nargs="?", help="of W&B")
    options.add_argument("--entity", help="user or team (the account's default)")
    options.add_argument("--offline", nargs="+", type=Path, metavar="FOLDER", help="runs and sweeps for a local page")
    options.add_argument("--html", type=Path, metavar="FILE", help="the page (dashboard.html in the first folder)")
    given = options.parse_args(argv)
    if given.offline:
        runs = [run for run in read_runs(given.offline) if run.rows]
        if not runs:
            raise UserError("none of these runs has a row in its metrics.csv.")
        target = given.html or given.offline[0] / "dashboard.html"
        write_text(target, dashboard(runs, given.project or f"{given.offline[0].name}: the dashboard"), "--html")
        print(f"The page is {shown(target)}")
        return 0
    if given.html:
        raise UserError("--html is of the local page: give --offline RUN_OR_SWEEP, too.")
    if not given.project:
        raise UserError("name the W&B project, or give --offline RUN_OR_SWEEP for a local page.")
    _online()
    made, written = workspace.save(given.project, given.entity)
    print(f"workspace  {made}\nreport     {written}")
    return 0


def log_main(argv: Sequence[str]) -> int:
    """Log files as artifacts of the W&B project that a run belongs to."""
    from nanochat.reports.wandb_logger import log_files  # imports torch and Lightning

    options = Parser("wandb log", log_files.__doc__, as_json=False)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("run", type=Path, help="the run folder")
    options.add_argument("files", nargs="+", type=Path, metavar="FILE", help="such as a .gguf file")
    options.add_argument("--offline", action="store_true", help="keep it for `wandb sync`")
    given = options.parse_args(argv)
    if not given.offline:
        _online()
    for name in log_files(given.run, given.files, given.offline):
        print(name)
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "sweep": sweep_main,
    "dashboard": dashboard_main,
    "log": log_main,
}


def _online() -> None:
    """Raise `UserError` where W&B cannot be reached from here."""
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise UserError("this needs the package wandb: pip install 'nanochat[wandb]'.") from error
    url = wandb_account.server() or wandb.setup().settings.base_url
    if problem := wandb_account.problem(url, TIMEOUT):
        raise UserError(f"W&B cannot be used: {problem}; log in with `wandb login`, or say --offline.")
