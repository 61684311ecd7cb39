"""From the command line to a run and its exit code; training itself is a stand-in here."""

from __future__ import annotations

import csv
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from nanochat import cli, launch
from nanochat.config import rules
from nanochat.errors import ConfigError, UserError
from nanochat.reports import sweep
from tests.launching.conftest import Call

ROOT = Path(__file__).resolve().parents[2]


def folders(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


# ---- one run --------------------------------------------------------------------------------------------------------


def test_a_run_lands_in_its_folder(runs, call: Call, tmp_path: Path) -> None:
    code, _, err = call("model=d20", "trainer.max_steps=5")
    assert (code, err) == (0, "")
    assert runs[0].trainer.max_steps == 5
    [folder] = tmp_path.glob("outputs/*/*")
    assert folder.name.endswith("-d20")
    assert (folder / "train.log").exists()
    assert (folder / ".hydra" / "overrides.yaml").exists()


def test_the_folder_can_be_chosen(runs, call: Call, tmp_path: Path) -> None:
    assert call("hydra.run.dir=here/now", "task_name=x")[0] == 0
    assert (tmp_path / "here" / "now" / "summary.json").exists()
    assert not (tmp_path / "outputs").exists()


def test_problems_stop_a_run_before_anything_is_written(runs, call: Call, tmp_path: Path) -> None:
    code, out, err = call("+mpt=on", "seed=-1")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert "did you mean 'mtp'" in err
    assert "seed=-1" in err
    assert runs == []
    assert folders(tmp_path) == []


def test_auto_needs_a_folder_that_stays_the_same(runs, call: Call, tmp_path: Path) -> None:
    code, _, stderr = call("ckpt_path=auto")
    assert code == 2
    assert stderr == "error: ckpt_path=auto needs a folder that stays the same; give hydra.run.dir.\n"
    assert list(tmp_path.iterdir()) == []
    assert call("ckpt_path=auto", "hydra.run.dir=here")[0] == 0


def test_a_crash_in_the_check_stops_the_run_too(runs, call: Call, monkeypatch, tmp_path: Path) -> None:
    """Hydra swallows what a callback raises and trains on."""

    def crash(cfg: DictConfig) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(launch, "check", crash)
    code, _, err = call()
    assert code == 1
    assert "ZeroDivisionError" in err
    assert runs == []
    assert folders(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["optim=mun"], "did you mean 'muon'"),
        (["mtp=on"], "write +mtp=on"),
        (["+mtp=null"], "+mtp=off"),
        (["model.dmi=5"], "did you mean 'model.dim'"),
        (["x=="], "cannot be read"),
        (["experiment//absolute/path=mine.yaml"], "name a folder of your own with --config-dir FOLDER"),
        (["-m", "optim=muon,mun"], "did you mean 'muon'"),
        (["optim=muon,adamw"], "add -m"),
        (["hydra.run.dir=/proc/no/such"], "/proc/no"),
        (["hydra.run.dir=file/run"], "is a file"),
        (["--resume"], "needs the run folder"),
        (["--resume", "nowhere"], "no such run folder"),
        (["--resume", "."], "no config.yaml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_sentence_and_exit_code_2(runs, call: Call, tmp_path: Path, words, expected) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = call(*words)
    assert code == 2
    assert err.startswith("error: ")
    assert expected in err
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1
    assert runs == []
    assert folders(tmp_path) == ["file"]


def test_a_broken_file_of_ones_own(runs, call: Call, tmp_path: Path) -> None:
    (tmp_path / "own" / "model").mkdir(parents=True)
    (tmp_path / "own" / "model" / "mine.yaml").write_text("dim: 1\n  n_layers: [\n")
    code, _, err = call(f"hydra.searchpath=[file://{tmp_path}/own]", "model=mine")
    assert code == 2
    assert "own/model/mine.yaml is not valid YAML at line 2" in err
    assert "Traceback" not in err


def test_a_mistake_found_later_leaves_no_folder(runs, call: Call, tmp_path: Path) -> None:
    assert call("seed=13") == (2, "", "error: thirteen is unlucky.\n")
    assert folders(tmp_path) == []


def test_a_folder_that_was_there_stays(runs, call: Call, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.log").write_text("precious\n")
    assert call("seed=13", "hydra.run.dir=mine")[0] == 2
    assert (tmp_path / "mine" / "train.log").read_text().startswith("precious\n")


def test_a_folder_with_a_checkpoint_stays(runs, call: Call, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(launch, "LEAVINGS", launch.LEAVINGS - {"config.yaml"})  # as if it held more
    assert call("seed=13", "hydra.run.dir=new")[0] == 2
    assert (tmp_path / "new" / "config.yaml").exists()


def test_other_errors_are_raised(runs, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the machine broke"):
        launch.main(["seed=14"])
    assert list(tmp_path.glob("outputs/*/*/train.log"))


def test_interruptions_have_their_codes(runs, call: Call) -> None:
    assert call("seed=15")[0] == 130
    assert call("seed=16")[0] == 143


# ---- sweeps ---------------------------------------------------------------------------------------------------------


def test_a_sweep_ends_with_a_table(runs, call: Call, tmp_path: Path) -> None:
    code, out, err = call("trainer.max_steps=5", "-m", "optim=adamw,muon", "seed=2,1")
    assert (code, err) == (0, "")
    assert [(cfg.seed, cfg.trainer.max_steps) for cfg in runs] == [(2, 5), (1, 5), (2, 5), (1, 5)]
    [folder] = tmp_path.glob("outputs/*/*-sweep")
    rows = list(csv.DictReader((folder / "sweep.csv").open()))
    assert (tmp_path / "outputs" / "latest").resolve() == Path(rows[0]["folder"]).resolve()
    assert [row["job"] for row in rows] == ["1", "3", "0", "2"]  # best first
    assert [float(row["val/bpb"]) for row in rows] == [2.0, 2.0, 3.0, 3.0]
    assert rows[0]["overrides"] == "trainer.max_steps=5 optim=adamw seed=1"
    assert rows[0]["optim/bytes"] == "1024"
    assert "optim=adamw seed=1" in out
    assert "1,024" in out


def test_features_are_swept(runs, call: Call) -> None:
    assert call("-m", "+mtp=on,off")[0] == 0
    assert ["_target_" in cfg.mtp for cfg in runs] == [True, False]


def test_one_bad_job_does_not_stop_the_others(runs, call: Call, tmp_path: Path) -> None:
    code, out, err = call("-m", "model.n_heads=3,4", "seed=1,13")
    assert code == 2
    assert "Traceback" not in err
    assert [(cfg.model.n_heads, cfg.seed) for cfg in runs] == [(4, 1), (4, 13)]
    assert "job 0 (model.n_heads=3 seed=1) failed: model.dim=256 is not divisible" in out
    assert "job 3 (model.n_heads=4 seed=13) failed: thirteen is unlucky." in out
    [folder] = tmp_path.glob("outputs/*/*-sweep")
    assert sorted(path.name for path in folder.iterdir()) == ["2", "multirun.yaml", "sweep.csv"]


def test_a_crash_in_a_sweep_gives_exit_code_1(runs, call: Call) -> None:
    code, out, err = call("-m", "seed=14,13,1")
    assert code == 1
    assert "RuntimeError: the machine broke" in out
    assert "Traceback" in err
    assert runs[-1].seed == 1


def test_an_interrupted_sweep_stops_and_shows_what_is_done(runs, call: Call) -> None:
    code, out, _ = call("-m", "seed=1,15,2")
    assert code == 130
    assert [cfg.seed for cfg in runs] == [1, 15]
    assert "val/bpb" in out


def test_lists_are_swept(runs, call: Call) -> None:
    """Brackets mean something to what draws the table."""
    code, out, _ = call("-m", "tags=[a,b],[/c]", "seed=1,13")
    assert code == 2
    assert "tags=[a,b] seed=1" in out
    assert "(tags=[/c] seed=13) failed" in out


def test_sweepers_get_the_bits_per_byte(runs, call: Call, monkeypatch) -> None:
    returned: list[Any] = []
    keep = launch.Hooks.on_job_end
    monkeypatch.setattr(
        launch.Hooks,
        "on_job_end",
        lambda self, config, job_return, **kw: (
            returned.append(job_return.return_value),
            keep(self, config, job_return, **kw),
        ),
    )
    assert call("-m", "seed=3,4")[0] == 0
    assert returned == [4.0, 5.0]


def test_a_sweeper_without_a_value_to_minimise_is_told_so(runs, call: Call, monkeypatch) -> None:
    assert call("-m", "seed=17")[0] == 0
    monkeypatch.setattr(launch, "sweeper_minimises", lambda: True)
    code, out, _ = call("-m", "seed=17")
    assert code == 2
    assert "a sweeper minimises val/bpb, and this run has none" in " ".join(out.split())
    values = rules.Values({"data": {"corpus": "synthetic"}, "trainer": {"limit_val_batches": 0}}, [])
    monkeypatch.setattr(rules, "sweeper_minimises", lambda: True)
    texts = [str(problem) for problem in rules.sweeper_sees_something(values)]
    assert [text.rpartition(": ")[2] for text in texts] == [
        "trainer.limit_val_batches=0 has no validation.",
        "data=synthetic has no text.",
    ]


def test_exit_codes_of_sweeps() -> None:
    def jobs(*errors: Exception | None) -> list[sweep.Job]:
        return [sweep.Job(i, [], Path(), error) for i, error in enumerate(errors)]

    assert sweep.exit_code(jobs(None, None)) == 0
    assert sweep.exit_code(jobs(None, UserError("a"), ConfigError("b"))) == 2
    assert sweep.exit_code(jobs(UserError("a"), ValueError("b"))) == 1


# ---- resume ---------------------------------------------------------------------------------------------------------


def test_resume_takes_the_saved_configuration(runs, call: Call, tmp_path: Path, monkeypatch) -> None:
    assert call("model=d20", "optim.lr=0.5", "hydra.run.dir='a run=1'", "+mtp=on")[0] == 0
    folder = tmp_path / "a run=1"
    saved, overrides = (folder / "config.yaml").read_text(), (folder / ".hydra" / "overrides.yaml").read_text()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "latest").symlink_to(folder)
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, _, err = call("--resume", "../latest", "trainer.max_steps=77")
    assert (code, err) == (0, "")
    first, second = (OmegaConf.to_container(cfg, resolve=False) for cfg in runs)
    assert second["ckpt_path"] == "last"
    assert second["trainer"]["max_steps"] == 77
    assert second["optim"] == first["optim"]
    assert second["mtp"] == first["mtp"]
    assert second["model"]["dim"] == 256
    assert second["task_name"] == "d20"
    assert (folder / "config.yaml").read_text() == saved
    assert (folder / ".hydra" / "overrides.yaml").read_text() == overrides
    assert folders(tmp_path / "elsewhere") == []


def test_resume_keeps_its_groups(runs, call: Call, tmp_path: Path) -> None:
    assert call("hydra.run.dir=run")[0] == 0
    code, _, err = call("--resume=run", "optim=adamw")
    assert code == 2
    assert "a resumed run keeps its optim" in err
    assert call("--resume=run", "optim.lrr=1")[2].count("did you mean 'optim.lr'") == 1
    assert call("--resume=run", "-m", "seed=1,2")[0] == 2
    assert len(runs) == 1


def test_resume_of_a_broken_configuration(runs, call: Call, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("a: [")
    assert "cannot be read" in call("--resume", "run")[2]
    (tmp_path / "run" / "config.yaml").write_text("a: 1")
    assert "not the configuration of a run" in call("--resume", "run")[2]


# ---- resuming sweeps ------------------------------------------------------------------------------------------------


def test_a_stopped_sweep_goes_on(runs, call: Call, tmp_path: Path, monkeypatch) -> None:
    """Finished jobs are skipped; the one that was stopped and those after it are run, with the same overrides."""
    sweep_words = ("-m", "seed=1,15,2", "tags=[a,b]", "hydra.sweep.dir=swept")
    assert call(*sweep_words)[0] == 130
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(launch.sweep, "finished", _finished_or_15(launch.sweep.finished))
    code, out, err = call("--resume", "../swept")
    assert (code, err) == (0, "")
    assert [cfg.seed for cfg in runs] == [1, 15, 2]
    assert "1 is finished already" in out
    assert [row["job"] for row in csv.DictReader((tmp_path / "swept" / "sweep.csv").open())] == ["0", "2", "1"]
    assert Path.cwd() == tmp_path / "elsewhere"
    monkeypatch.chdir(tmp_path)
    assert call(*sweep_words)[0] == 0  # the same command does the same
    assert len(runs) == 3


def _finished_or_15(finished: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """As `sweep.finished`, and as if job 1 had been finished meanwhile."""
    return lambda folder: {"val/bpb": 9.0, "status": "finished"} if folder.name == "1" else finished(folder)


def test_failed_jobs_are_run_again(runs, call: Call, tmp_path: Path) -> None:
    assert call("-m", "seed=1,13", "hydra.sweep.dir=swept")[0] == 2
    assert call("--resume=swept")[0] == 2
    assert [cfg.seed for cfg in runs] == [1, 13, 13]


def test_a_sweep_keeps_its_jobs(runs, call: Call, tmp_path: Path) -> None:
    assert call("-m", "seed=1,2", "hydra.sweep.dir=swept")[0] == 0
    before = (tmp_path / "swept" / "sweep.csv").read_text()
    code, _, err = call("-m", "seed=1,3", "hydra.sweep.dir=swept")
    assert code == 2
    assert err == "error: swept holds another sweep (seed=1,2); choose another hydra.sweep.dir.\n"
    code, _, err = call("--resume", "swept", "seed=3")
    assert (code, err.count("a sweep keeps its overrides (seed=3)")) == (2, 1)
    (tmp_path / "swept" / "multirun.yaml").write_text("hydra: 3\n")
    assert "cannot be read as what a sweep leaves" in call("--resume", "swept")[2]
    assert len(runs) == 2
    assert (tmp_path / "swept" / "sweep.csv").read_text() == before


@pytest.mark.parametrize(
    ("task", "hydra", "said"),
    [
        ("+trainer.profiler._target_=os.system", "hydra.mode=MULTIRUN", "would be run"),
        ("+trainer={profiler: {_target_: os.system}}", "hydra.mode=MULTIRUN", "would be run"),
        ("task_name=${oc.env:HOME}", "hydra.mode=MULTIRUN", "is an interpolation"),
        ("data.cache_dir=/etc", "hydra.mode=MULTIRUN", "outside of the run folder"),
        ("seed=1,2", "hydra.launcher._target_=os.system", "is a setting of Hydra's"),
        ("seed=1,2", "hydra.searchpath=[file:///tmp]", "is a setting of Hydra's"),
    ],
)
def test_a_stranger_s_sweep(runs, call: Call, tmp_path: Path, task: str, hydra: str, said: str) -> None:
    (tmp_path / "swept").mkdir()
    saved = {"hydra": {"overrides": {"task": [task], "hydra": [hydra]}, "runtime": {"cwd": str(tmp_path)}}}
    (tmp_path / "swept" / "multirun.yaml").write_text(json.dumps(saved))
    code, _, err = call("--resume", "swept")
    assert code == 2
    assert said in err
    assert "Traceback" not in err
    assert runs == []
    assert folders(tmp_path) == ["swept", "swept/multirun.yaml"]


# ---- processes ------------------------------------------------------------------------------------------------------


def process(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def test_the_configuration_is_shown_from_anywhere(tmp_path: Path) -> None:
    shown = process(str(ROOT / "train.py"), "--cfg", "job", "--resolve", "experiment=d20", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    cfg = OmegaConf.create(shown.stdout)
    assert cfg.task_name == "d20"
    assert cfg.model.n_layers == 6
    helped = process("-m", "nanochat.cli", "train", "--help", cwd=tmp_path)
    assert helped.returncode == 0, helped.stderr
    assert "model: " in helped.stdout
    assert "d20-e3-full" in helped.stdout
    assert folders(tmp_path) == []


def test_train_py_refuses_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = process(str(ROOT / "train.py"), "model.n_heads=3", "model.n_kv_heads=1", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: model.dim=256 is not divisible by model.n_heads=3.\n"
    assert folders(tmp_path) == []


@pytest.mark.parametrize("word", ["+mpt=on", "optim=mun", "model.dmi=5", "trainer.max_steps=0", "--multirn"])
def test_a_mistake_that_needs_no_torch_imports_none(tmp_path: Path, word: str) -> None:
    code = "import sys\nfrom nanochat.launch import main\ntry:\n    found = main(sys.argv[1:])\n"
    code += "except SystemExit as error:\n    found = error.code\n"
    done = process("-c", code + "print(found, 'torch' in sys.modules)", word, cwd=tmp_path)
    assert done.stdout == "2 False\n"
    assert done.stderr.startswith("error: ")


@pytest.mark.skipif(sys.platform != "linux", reason="the variable is for Linux alone")
def test_the_allocator_is_set_before_torch_is_there(tmp_path: Path) -> None:
    code = "import os, sys; os.environ.pop('THP_MEM_ALLOC_ENABLE', None); import train\n"
    code += "print(os.environ['THP_MEM_ALLOC_ENABLE'], 'torch' in sys.modules)"
    assert process("-c", code, cwd=ROOT).stdout == "1 False\n"
    code = "import os, sys; import nanochat.cli as c; c.main(['trian']); c.main(['params', '--help'])\n"
    shown = process("-c", code.replace("c.main(['params', '--help'])", "print('torch' in sys.modules)"), cwd=ROOT)
    assert shown.stdout == "False\n"
    assert "did you mean 'train'" in shown.stderr


# ---- the dispatcher -------------------------------------------------------------------------------------------------


def test_every_verb_exists() -> None:
    for place, text in cli.VERBS.values():
        module, function = place.split(":")
        assert callable(getattr(importlib.import_module(module), function))
        assert text


def test_the_dispatcher_hands_on(monkeypatch, capsys) -> None:
    module = ModuleType("nanochat.fake_verb")
    answers: dict[str, Any] = {"error": UserError("no."), "stop": KeyboardInterrupt(), "pipe": BrokenPipeError()}

    def main(argv: list[str]) -> int | None:
        if argv and argv[0] in answers:
            raise answers[argv[0]]
        return len(argv) or None

    module.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nanochat.fake_verb", module)
    monkeypatch.setitem(cli.VERBS, "fake", ("nanochat.fake_verb:main", "for this test"))
    assert cli.main(["fake"]) == 0
    assert cli.main(["fake", "a", "b", "c"]) == 3
    assert cli.main(["fake", "stop"]) == 130
    assert cli.main(["fake", "error"]) == 2
    assert capsys.readouterr().err == "error: no.\n"
    assert cli.main(["fak"]) == 2
    assert "did you mean 'fake'" in capsys.readouterr().err


def test_usage_names_every_verb(capsys) -> None:
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in cli.VERBS)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("nanochat ")
