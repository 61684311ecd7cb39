"""`nanochat wandb`: sweeps as W&B's own agent reads them, and dashboards as wandb-workspaces sends them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from nanochat.cli import main
from nanochat.config.compose import compose
from nanochat.errors import UserError
from nanochat.reports import workspace
from nanochat.reports.panels import BLOCKS, SAMPLES, SUMMARY, Panel
from nanochat.reports.wandb_logger import log_files
from nanochat.studies.dashboard import figure, labels
from nanochat.studies.evidence import read_runs
from nanochat.studies.wandb_sweep import sweep
from tests.reports.folders import write_run


def started(content: dict[str, Any], values: dict[str, Any]) -> list[str]:
    """What an agent runs, by the functions that it uses."""
    arguments = create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
    arguments |= {"interpreter": ["python"], "program": [content["program"]], "env": []}
    command: list[str] = []
    for part in create_sweep_command(list(content["command"])):
        whole = part.startswith("${") and part.endswith("}")
        command += arguments[part[2:-1]] if whole else [part]
    return command


def test_agents_start_runs_of_the_very_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "r1")
    path = tmp_path / "sweep.yaml"
    words = ["model=tiny", "optim=adamw,muon", "+mtp=on,off", "tags=[],['a b,c']", "compile=true,false",
             "seed=range(1,7,3)", "data.batch_size=4"]  # fmt: skip
    assert main(["wandb", "sweep", *words, "--out", str(path), "--name", "first", "--runs", "7"]) == 0
    content = yaml.safe_load(path.read_text())
    assert (content["method"], content["program"], content["run_cap"]) == ("grid", "train.py", 7)
    assert content["metric"] == {"name": "val/bpb", "goal": "minimize"}
    choices = {key: parameter["values"] for key, parameter in content["parameters"].items()}
    assert list(choices) == ["optim", "+mtp", "tags", "compile", "seed"]
    assert choices["seed"] == [1, 4]
    first = {key: values[0] for key, values in choices.items()}
    last = {key: values[-1] for key, values in choices.items()}
    expected = [("adamw", [], True, 1), ("muon", ["a b,c"], False, 4)]
    for values, (optim, tags, compiled, seed) in zip((first, last), expected, strict=True):
        python, program, *overrides = started(content, values)
        assert (python, program) == ("python", "train.py")
        plain = compose(overrides)
        assert list(plain["logger"]) == ["wandb"]
        assert plain["optim"]["groups"]["matrices"]["rule"] == ("muon" if optim == "muon" else "adamw")
        assert (plain["tags"], plain["compile"], plain["seed"]) == (tags, compiled, seed)
        assert plain["data"]["batch_size"] == 4
        assert bool(plain.get("mtp")) == (values["+mtp"] == "on")
        folder = next(word for word in overrides if word.startswith("hydra.run.dir="))
        assert folder == "hydra.run.dir=outputs/wandb-sweep/${oc.env:WANDB_SWEEP_ID}/${oc.env:WANDB_RUN_ID}"


def test_intervals_have_their_distributions() -> None:
    content = sweep(["optim.lr=tag(log,interval(0.003,0.1))", "seed=int(interval(0,9))", "loss.z_loss=interval(0,0.5)"])
    assert content["method"] == "bayes"
    assert content["parameters"] == {
        "optim.lr": {"distribution": "log_uniform_values", "min": 0.003, "max": 0.1},
        "seed": {"distribution": "int_uniform", "min": 0, "max": 9},
        "loss.z_loss": {"distribution": "uniform", "min": 0.0, "max": 0.5},
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sweep", "model=tiny"], "nothing is swept"),
        (["sweep", "optim=adamw,muno"], "muno"),
        (["sweep", "optim=adamw,muon", "optm.lr=1"], "optm"),
        (["sweep", "optim.lr=interval(1,0.5)"], "the interval must rise"),
        (["sweep", "optim.lr=tag(log,interval(0,0.5))"], "begins above 0"),
        (["sweep", "optim.lr=interval(0,0.5)", "--method", "grid"], "cannot search the interval of optim.lr"),
        (["sweep", "seed=range(0,1000000)"], "values, of at most"),
        (["sweep", "seed=0,1", "logger=csv"], "must log to it"),
        (["sweep", "seed=0,1", "logger=wandb", "logger.wandb.offline=true"], "are online"),
        (["sweep", "seed=0,1", "--out", "/proc/no/sweep.yaml"], "choose another with --out"),
        (["sweeps"], "did you mean 'sweep'"),
        (["dashboard"], "name the W&B project"),
        (["dashboard", "x", "--html", "y"], "--html is of the local page"),
        (["dashboard", "--offline", "/nowhere"], "/nowhere"),
        (["log", "/nowhere", "x.gguf"], "no wandb.json"),
    ],
)
def test_mistakes_are_one_sentence(words: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    if words[0] == "log":
        words = [*words, "--offline"]
    assert main(["wandb", *words]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert said in shown.err
    assert shown.out == ""


def test_a_dashboard_needs_an_account(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", "/nowhere")
    assert main(["wandb", "dashboard", "x"]) == 2
    assert "there is no account on this machine; log in with `wandb login`" in capsys.readouterr().err


def test_workspace_and_report_name_every_panel() -> None:
    panels = [panel for block in BLOCKS for panel in block.panels]
    for made in (workspace.workspace("p", "e"), workspace.report("p", "e")):
        sent = json.loads(made._to_model().model_dump_json(by_alias=True))
        text = json.dumps(sent)
        lines = _line_plots(sent)
        assert [line["chartTitle"] for line in lines] == [panel.title for panel in panels]
        for line, panel in zip(lines, panels, strict=True):
            assert line["xAxis"] == ("tokens" if panel.against == "tokens" else "_runtime")
            if panel.numbered:
                assert (line["metricRegex"], line["useMetricRegex"]) == (panel.pattern(), True)
            else:
                assert line["metrics"] == list(panel.keys)
        for key in (*SUMMARY, SAMPLES):
            assert key in text


def _line_plots(node: Any) -> list[dict[str, Any]]:
    """The configurations of the line plots in a tree, in order."""
    if isinstance(node, list):
        return [plot for child in node for plot in _line_plots(child)]
    if not isinstance(node, dict):
        return []
    if node.get("viewType") == "Run History Line Plot":
        return [node["config"]]
    return [plot for child in node.values() for plot in _line_plots(child)]


def test_a_refusal_of_the_server_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("permission\ndenied")

    monkeypatch.setattr("wandb_workspaces.reports.v2.Report.save", refuse)
    with pytest.raises(UserError, match=r"^W&B refuses the dashboard of p: permission denied\.$"):
        workspace.save("p", "e")
    monkeypatch.setattr("wandb.Api", lambda: SimpleNamespace(default_entity=None))
    with pytest.raises(UserError, match="name one with --entity"):
        workspace.save("p", None)


def test_a_numbered_panel_takes_its_own_in_order() -> None:
    panel = Panel("", "", ("ternary/zeros", "mtp/loss"), numbered=True)
    names = ["ternary/zeros_10", "ternary/zeros", "ternary/zeros_2", "ternary/zeros_x", "mtp/loss_3", "xmtp/loss_3"]
    assert panel.found(names) == ["mtp/loss_3", "ternary/zeros_2", "ternary/zeros_10"]
    assert Panel("", "", ("val/bpb",)).found(["val/bpb_2", "val/bpb", "val/bpb2"]) == ["val/bpb"]


def test_lines_lie_where_metrics_has_them(tmp_path: Path) -> None:
    """100 tokens a step, and 1000 tokens a second: step 40 after 4000 tokens and 4 seconds."""
    (run,) = read_runs([write_run(tmp_path / "a <b>", 2.0)])
    for panel, end in ((Panel("t", "u", ("val/bpb",)), 4000), (Panel("t", "u", ("val/bpb",), against="time"), 4)):
        points = re.findall(r'data-points="([^"]*)"', figure(panel, [run], labels([run])))[0].split()
        assert points[-1] == f"{end},2"
        assert len(points) == 4
    assert "<b>" not in figure(Panel("t", "u", ("val/bpb",)), [run], labels([run]))
    assert figure(Panel("t", "u", ("no/such",)), [run], ["x"]) == ""


def test_runs_are_told_apart_by_their_overrides() -> None:
    runs = [SimpleNamespace(name=f"f{i}", overrides=[*words, "seed=0"]) for i, words in
            enumerate((["optim=muon"], ["optim=adamw", "+mtp=on"], [], ["a=1"], ["a=1"]))]  # fmt: skip
    assert labels(runs) == ["optim=muon", "optim=adamw +mtp=on", "f2", "f3", "f4"]  # type: ignore[arg-type]


def test_files_of_a_run_are_logged_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Online, with the client's run in place of a server."""
    folder = write_run(tmp_path / "run", 2.0)
    (folder / "wandb.json").write_text('{"id": "abc", "project": "p", "entity": null}')
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"x")
    (tmp_path / "run.gguf").write_bytes(b"GGUF")
    inputs, outputs, options = [], [], {}

    class Client:
        use_artifact, log_artifact = staticmethod(inputs.append), staticmethod(outputs.append)

        def __enter__(self) -> Client:
            return self

        def __exit__(self, *args: Any) -> None: ...

    def init(**given: Any) -> Client:
        options.update(given)
        return Client()

    monkeypatch.setattr("wandb.init", init)
    assert log_files(folder, [tmp_path / "run.gguf"], offline=False) == ["gguf-abc"]
    assert (options["project"], options["job_type"], options["mode"]) == ("p", "export", "online")
    assert [(a.name, a.type, a.metadata["step"]) for a in inputs] == [("model-abc", "model", 40)]
    assert [(a.type, list(a.manifest.entries)) for a in outputs] == [("gguf", ["run.gguf"])]
    inputs.clear()
    log_files(folder, [tmp_path / "run.gguf"], offline=True)
    assert (inputs, options["mode"]) == ([], "offline")
    with pytest.raises(UserError, match="there is no file"):
        log_files(folder, [tmp_path / "none"], offline=True)
