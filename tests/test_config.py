"""Everything composes, and every mistake is found, Hydra's own traps among them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from lightning import Callback
from omegaconf import DictConfig, OmegaConf

from nanochat.config import rules
from nanochat.config.check import check
from nanochat.config.compose import compose
from nanochat.config.schema import CONF, DEFAULTS, TARGET_GROUPS, features
from nanochat.config.signatures import check_arguments, check_nodes, fits
from nanochat.errors import ConfigError

GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")
OPTIONS = sorted((path.parent.name, path.stem) for group in GROUPS for path in (CONF / group).glob("*.yaml"))
FILES = sorted(CONF.rglob("*.yaml"))
FEATURES = sorted(features())


def problems(*overrides: str) -> list[str]:
    """Everything that is wrong with a configuration."""
    try:
        compose(overrides)
    except ConfigError as error:
        return error.problems
    return []


@pytest.fixture(scope="module")
def default() -> DictConfig:
    """The configuration of `python train.py`, composed once."""
    return OmegaConf.create(compose())


def problems_of_values(default: DictConfig, *overrides: str) -> list[str]:
    """As `problems`, for changed values alone and without Hydra, which takes most of the time."""
    try:
        check(OmegaConf.merge(default, OmegaConf.from_dotlist(list(overrides))))
    except ConfigError as error:
        return error.problems
    return []


def choose(group: str, option: str) -> str:
    return f"{'+' if group in FEATURES else ''}{group}={option}"


@pytest.fixture
def own_files(tmp_path: Path) -> str:
    """A user's own folder of options, as an override: a feature `demo`, and an experiment that tunes it."""
    files = {
        "demo/on.yaml": "_target_: tests.test_config.Demo\nheads: 2\n",
        "demo/off.yaml": "# nothing\n",
        "experiment/with_demo.yaml": '# @package _global_\ndefaults:\n  - /demo: "on"\n  - override /model: tiny\n'
        "demo:\n  heads: 4\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return f"hydra.searchpath=[file://{tmp_path}]"


class Demo(Callback):
    """A target."""

    def __init__(self, heads: int, name: str | None = None, scale: float = 1.0, parts: list[Any] | None = None) -> None:
        self.heads = heads


class Open(Demo):
    """Hands its keywords on."""

    def __init__(self, extra: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)


class Strict:
    """Knows a few words."""

    def __init__(self, mode: Literal["min", "max"] = "min") -> None: ...


# ---- the files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_checks(group: str, option: str, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # for trainer=gpu
    find_spec = rules.importlib.util.find_spec
    monkeypatch.setattr(rules.importlib.util, "find_spec", lambda name: name == "wandb" or find_spec(name))
    monkeypatch.setenv("WANDB_API_KEY", "0")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("some text\n" * 100)
    (tmp_path / "lines.jsonl").write_text('{"text": "some text"}\n' * 100)
    extra = {
        ("data", "text"): ["data.paths=[text.txt]"],
        ("data", "code"): ["data.paths=[text.txt]"],
        ("data", "jsonl"): ["data.paths=[lines.jsonl]"],
    }
    cfg = compose([choose(group, option), *extra.get((group, option), [])])
    for name in TARGET_GROUPS:
        assert "_target_" in cfg[name]


def test_there_is_an_experiment_for_each_preset() -> None:
    presets = {option for group, option in OPTIONS if group == "model"} - {"base"}
    assert presets <= {option for group, option in OPTIONS if group == "experiment"}
    assert presets == set(PRESETS)


PRESETS = {  # d, L, H/KV, FFN, vocab, seq, tied, batch x accum, warm-up/steps
    "tiny": (256, 4, "4/4", 512, 4096, 256, True, None, None),  # its recipe is tuned by measurement
    "d20": (256, 6, "4/4", 768, 50257, 256, True, "32x1", "100/5000"),
    "test-8bit": (256, 4, "8/8", 512, 50257, 256, False, "2x1", "20/100"),
    "nano-125m": (768, 12, "12/12", 2176, 50257, 512, True, "8x4", "500/50000"),
    "d20-e3-full": (768, 24, "12/12", 2688, 50257, 2048, False, "8x4", "2000/50000"),
    "nano-1b": (2048, 20, "16/16", 5504, 50257, 1024, True, "4x8", "2000/100000"),
    "medium-3b": (2048, 28, "32/8", 7168, 50257, 4096, True, "2x16", "5000/200000"),
    "large-7b": (4096, 32, "32/8", 11008, 128000, 4096, True, "1x32", "8000/300000"),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_sizes_of_the_table(name: str) -> None:
    dim, layers, heads, ffn, vocabulary, length, tied, batch, steps = PRESETS[name]
    model = compose([f"model={name}"])["model"]
    assert (model["dim"], model["n_layers"], f"{model['n_heads']}/{model['n_kv_heads']}") == (dim, layers, heads)
    assert (model["ffn_dim"], model["vocab_size"], model["seq_len"], model["tied"]) == (ffn, vocabulary, length, tied)
    cfg = compose([f"experiment={name}"])
    assert cfg["model"]["dim"] == dim
    assert cfg["tokenizer"]["vocab_size"] == vocabulary
    assert cfg["task_name"] == name
    if batch is not None:
        trainer = cfg["trainer"]
        assert f"{cfg['data']['batch_size']}x{trainer['accumulate_grad_batches']}" == batch
        assert f"{cfg['schedule']['warmup_steps']}/{trainer['max_steps']}" == steps
        assert cfg["data"]["seq_len"] == length


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONF)))
def test_on_and_off_are_quoted(path: Path) -> None:
    """YAML 1.1 reads a bare `on` as true, so that `- /mtp: on` is no option of a group."""

    def scalars(node):
        if isinstance(node, yaml.ScalarNode):
            yield node
        elif node is not None:
            for child in node.value:
                yield from (s for part in (child if isinstance(child, tuple) else (child,)) for s in scalars(part))

    bare = [s for s in scalars(yaml.compose(path.read_text())) if s.style is None]
    assert not [s.value for s in bare if s.value.lower() in ("on", "off", "yes", "no")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONF)))
def test_override_lines_come_last(path: Path) -> None:
    defaults = (yaml.safe_load(path.read_text()) or {}).get("defaults", [])
    overriding = [
        str(next(iter(item))).startswith("override ") if isinstance(item, dict) else False for item in defaults
    ]
    assert overriding == sorted(overriding)


def test_only_train_yaml_lists_groups_and_no_features() -> None:
    """With `- mtp: null` in the defaults list `+mtp=on` fails."""
    listed = {
        next(iter(d)) for d in yaml.safe_load((CONF / "train.yaml").read_text())["defaults"] if isinstance(d, dict)
    }
    assert set(DEFAULTS) == {name for name in listed if not name.startswith("override ")}
    assert {"mtp", "collider", "mhc"} <= set(FEATURES)


@pytest.mark.parametrize("group", FEATURES)
def test_each_feature_can_be_switched_on_and_off(group: str) -> None:
    assert "_target_" in compose([f"+{group}=on"])[group] or group == "mhc"
    assert compose([f"+{group}=off"])[group] == {}


@pytest.mark.parametrize("path", sorted((CONF / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_an_experiment_selects_every_group_that_it_tunes(path: Path) -> None:
    """A feature or group added after the experiment would reset the values that the experiment gave it."""
    assert path.read_text().startswith("# @package _global_")
    recipe = yaml.safe_load(path.read_text())
    selected = {str(next(iter(item))).removeprefix("override ").lstrip("/") for item in recipe.pop("defaults")}
    assert {key for key in recipe if key in GROUPS} <= selected


@pytest.mark.parametrize("path", sorted((CONF / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_an_experiment_runs_without_callbacks(path: Path) -> None:
    assert compose([f"experiment={path.stem}", "callbacks=none"])["callbacks"] == {}


# ---- Hydra's traps --------------------------------------------------------------------------------------------------


def test_a_feature_is_added_with_a_plus(own_files: str) -> None:
    assert compose([own_files, "+demo=on"])["demo"]["heads"] == 2
    assert compose([own_files, "+demo=on", "demo.heads=3"])["demo"]["heads"] == 3
    assert compose([own_files, "+demo=off"])["demo"] == {}
    assert "demo" not in compose([own_files])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["+mpt=on"], ["mpt", "did you mean 'mtp'"]),  # Hydra adds the string and trains without it
        (["mtp=on"], ["mtp=on", "write +mtp=on"]),
        (["+collider=on", "collider.sparsity=1"], ["collider.sparsity=1 must lie in [0, 1)"]),
        (["+collider=on", "collider.score=excess"], ["collider.reference=RUN belong together"]),
        (["+collider=on", "collider.score=foo"], ["collider.score='foo' is unknown"]),
        (["+collider=on", "collider.warmup_steps=-1"], ["collider.warmup_steps=-1 must be"]),
        (["+collider=on", "collider.cache=x"], ["collider.cache holds"]),
        (["+mtp=on", "mtp.tokens=40", "data.seq_len=32"], ["mtp.tokens=40 looks beyond", "at most 31"]),
        (["optim=adamw", "optim.betas=[0.9]"], ["optim.betas=[0.9] must be two numbers"]),
        (["optim.groups.hyper=5"], ["optim.groups.hyper=5 is not a group"]),
        (["optim=adamw", "optim.eps=0"], ["optim.eps=0 must be more than 0"]),
        (["++mtp=on"], ["write +mtp=on"]),
        (["+mtp=null"], ["+mtp=null", "+mtp=off"]),  # Hydra crashes with a TypeError
        (["+mtp=n"], ["mtp=n", "no option 'n'"]),
        (["+collider.sparsity=0.5"], ["collider.sparsity", "+collider=on"]),
        (["collider.sparsity=0.5"], ["collider.sparsity", "+collider=on"]),
        (["optim=mun"], ["optim=mun", "did you mean 'muon'"]),
        (["optm=muon"], ["optm=muon", "did you mean 'optim'"]),
        (["model.dmi=5"], ["model.dmi=5", "did you mean 'model.dim'"]),
        (["+model.dmi=5"], ["model.dmi", "did you mean 'dim'"]),
        (["++modle.dim=5"], ["modle", "did you mean 'model'"]),
        (["trainer.max_step=5"], ["did you mean 'trainer.max_steps'"]),
        (["+model.dim=5"], ["model.dim", "without the +"]),
        (["+callbacks.samplr.every=3"], ["callbacks.samplr", "did you mean 'sampler'"]),
        (["~callbacks.samplr"], ["callbacks.samplr", "did you mean 'callbacks.sampler'"]),
        (["experiment=tny"], ["did you mean 'tiny'"]),
        (["model=[d20,tiny]"], ["model=[d20,tiny]", "choose one"]),  # Hydra merges both
        (["x=="], ["'x=='", "cannot be read"]),
        (["model.dim"], ["'model.dim'", "cannot be read"]),
        (["hydra.searchpath=[file://no/such/folder]"], ["no/such/folder"]),
        (["model=null"], ["model=null", "name of one of its options"]),
        (["seed=???"], ["seed has no value yet"]),
        (["model=5"], ["model=5", "name of one of its options"]),
        (["~optim"], ["optim", "optim=OPTION"]),
        (["model=d20", "model.n_heads=3", "~data"], ["data is not chosen"]),
    ],
    ids=lambda value: " ".join(value) if (value and "=" in value[0]) or "~" in str(value[0]) else "",
)
def test_typos_are_found_with_a_suggestion(overrides: list[str], words: list[str]) -> None:
    found = problems(*overrides)
    assert any(all(word in problem for word in words) for problem in found), found
    assert all("\n" not in problem for problem in found)


def test_an_experiment_that_chooses_a_feature(own_files: str) -> None:
    assert compose([own_files, "experiment=with_demo"])["demo"] == {"_target_": "tests.test_config.Demo", "heads": 4}
    [problem] = problems(own_files, "experiment=with_demo", "+demo=on")
    assert "+demo=on: demo=on is chosen already; write demo=on without the +" in problem
    # the experiment's own values survive: on is who has a _target_, not whose key exists
    assert compose([own_files, "experiment=with_demo", "demo=off"])["demo"] == {"heads": 4}


def test_numbers_in_scientific_notation_are_numbers() -> None:
    """PyYAML alone reads 3e-4 as a text."""
    assert compose(["optim.lr=3e-4"])["optim"]["lr"] == 3e-4


def test_a_callback_is_removed_by_its_name() -> None:
    assert "sampler" in compose()["callbacks"]
    assert "sampler" not in compose(["~callbacks.sampler"])["callbacks"]
    assert compose(["callbacks=none"])["callbacks"] == {}


def test_a_feature_that_the_model_knows_of() -> None:
    assert compose()["model"]["streams"] == 1
    with_streams = OmegaConf.create({"model": {"streams": "${oc.select:mhc.streams,1}"}, "mhc": {"streams": 2}})
    assert with_streams.model.streams == 2


def test_composing_leaves_nothing_behind() -> None:
    before = HydraConfig.instance().cfg
    compose(["model=d20"])
    problems("model=d21")
    assert HydraConfig.instance().cfg is before


# ---- targets --------------------------------------------------------------------------------------------------------

HERE = "tests.test_config"


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"_target_": f"{HERE}.Demo"}, ["x.heads is missing"]),
        ({"_target_": f"{HERE}.Demo", "_partial_": True, "head": 2}, ["x.head is not", "did you mean 'heads'"]),
        ({"_target_": f"{HERE}.Demo", "heads": "many"}, ["x.heads=many", "a whole number"]),
        ({"_target_": f"{HERE}.Demo", "heads": True}, ["x.heads=true", "a whole number"]),
        ({"_target_": f"{HERE}.Demo", "heads": 1.5}, ["x.heads=1.5", "a whole number"]),
        ({"_target_": f"{HERE}.Demo", "heads": 1, "name": 5}, ["x.name=5", "a text or null"]),
        ({"_target_": f"{HERE}.Demo", "heads": 1, "parts": 5}, ["x.parts=5", "a list or null"]),
        ({"_target_": f"{HERE}.Demo", "_args_": [1], "heads": 1}, ["x.heads is given twice"]),
        ({"_target_": f"{HERE}.Dmeo", "heads": 1}, ["x._target_", "'Dmeo'", "did you mean 'Demo'"]),
        ({"_target_": "nanochat.model.confg.GPTConfig"}, ["'confg'", "did you mean 'config'"]),
        ({"_target_": "nanochta.model.config.GPTConfig"}, ["no package 'nanochta'", "did you mean 'nanochat'"]),
        ({"_target_": f"{HERE}.HERE"}, ["cannot be called"]),
        ({"_target_": "not a name"}, ["must be a dotted name"]),
        ({"_target_": f"{HERE}.Open", "head": 1}, ["x.head is not an argument", "did you mean 'heads'"]),
        ({"_target_": f"{HERE}.Strict", "mode": "mni"}, ["x.mode=mni", "one of min, max"]),
        ({"_target_": "lightning.pytorch.loggers.WandbLogger", "entitty": "me"}, ["did you mean 'entity'"]),
        (
            {"_target_": f"{HERE}.Demo", "heads": 1, "parts": [{"_target_": f"{HERE}.Demo"}]},
            ["x.parts.0.heads is missing"],
        ),
        ({"_target_": f"{HERE}.Demo", "heads": {"_target_": f"{HERE}.Demo", "haeds": 1}}, ["x.heads.haeds is not"]),
        ({"inner": {"_target_": f"{HERE}.Demo", "haeds": 1}}, ["x.inner.haeds", "did you mean 'heads'"]),
    ],
)
def test_nodes_are_compared_with_their_targets(node: dict[str, Any], words: list[str]) -> None:
    found = [str(problem) for problem in check_nodes(node, "x")]
    assert any(all(word in problem for word in words) for problem in found), found


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": f"{HERE}.Demo", "_partial_": True},
        {"_target_": f"{HERE}.Demo", "heads": 1, "scale": 2, "_convert_": "all", "_recursive_": False},
        {"_target_": f"{HERE}.Demo", "_args_": [1]},
        {"_target_": f"{HERE}.Open", "extra": True, "heads": 1},
        {"_target_": "lightning.pytorch.loggers.WandbLogger", "entity": "me", "mode": "offline"},
        {"_target_": "builtins.dict", "anything": 1},
        {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "val/loss", "patience": 3},
    ],
)
def test_good_nodes_pass(node: dict[str, Any]) -> None:
    assert check_nodes(node, "x") == []


def test_every_unknown_argument_is_named() -> None:
    """`signature().bind_partial` names only the first."""
    found = check_arguments(Demo, {"heads": 1, "one": 1, "two": 2}, "x", supplied=set())
    assert [problem.key for problem in found] == ["x.one", "x.two"]


def test_what_the_run_supplies_is_neither_missing_nor_allowed() -> None:
    assert check_arguments(Demo, {}, "x", supplied={"heads"}) == []
    [problem] = check_arguments(Demo, {"heads": 1}, "x", supplied={"heads"})
    assert "set by the run itself" in problem.text
    assert any("group callbacks" in problem for problem in problems("+trainer.callbacks=[]"))


@pytest.mark.parametrize(
    ("value", "annotation", "good"),
    [
        (1, float, True),
        (1.0, int, False),
        (True, float, False),
        ("a", str | None, True),
        (["a"], list[str], True),
        (["a", 1], list[str], False),
        ("a", list[str], False),
        ("a", Sequence[str], True),
        ([0.9, 0.99], tuple[float, float], True),
        ([0.9], tuple[float, float], False),
        ({"a": 1}, dict[str, int], True),
        (5, "unknown", True),
        (5, Any, True),
    ],
)
def test_values_fit_annotations(value: Any, annotation: Any, good: bool) -> None:
    assert fits(value, annotation) is good


STOPPING = ["callbacks.stop._target_=nanochat.training.callbacks.early_stopping.EarlyStopping"]


# ---- rules between the fields ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.n_heads=3", "model.n_kv_heads=1"], ["model.dim=256", "model.n_heads=3"]),
        (["model.n_kv_heads=3"], ["model.n_heads=4", "model.n_kv_heads=3"]),
        (["model.dim=12"], ["must be even"]),
        (["model.dim=abc"], ["model.dim=abc", "a whole number"]),
        (["model.dim=-8"], ["model.dim=-8", "at least 1"]),
        (["model.n_layers=0"], ["model.n_layers=0", "at least 1"]),
        (["model.activation=gelu"], ["gelu", "silu"]),
        (["data.seq_len=300"], ["data.seq_len=300", "model.seq_len=256"]),
        (["tokenizer.vocab_size=5000"], ["tokenizer.vocab_size=5000", "model.vocab_size=4096"]),
        (["tokenizer.vocab_size=auto", "model.vocab_size=64"], ["model.vocab_size=64", "at least 257"]),
        (["data.batch_size=0"], ["data.batch_size=0", "at least 1"]),
        (["data.seq_len=-1"], ["data.seq_len=-1", "at least 1"]),
        (["trainer.max_steps=0"], ["trainer.max_steps=0", "at least 1"]),
        (["trainer.max_steps=1.5"], ["trainer.max_steps=1.5", "a whole number"]),
        (["trainer.accumulate_grad_batches=0"], ["accumulate_grad_batches=0", "at least 1"]),
        (["trainer.gradient_clip_val=-1"], ["gradient_clip_val=-1", "negative"]),
        (["trainer.val_check_interval=0"], ["val_check_interval=0"]),
        (["trainer.devices=2"], ["trainer.devices=2"]),
        (["trainer.max_time=soon"], ["trainer.max_time=soon", "DD:HH:MM:SS"]),
        (["trainer.accelerator=gpu0"], ["gpu0", "did you mean 'gpu'"]),
        (
            ["trainer.precision=16-mixed"],
            ["16-mixed", "gradients that are not scaled", "use bf16-mixed, 32-true or auto"],
        ),
        (["trainer.precision=transformer-engine"], ["needs the package transformer_engine"]),
        (["trainer.precision=fp16"], ["trainer.precision=fp16", "one of"]),
        (["optim.lr=-0.1"], ["optim.lr=-0.1", "negative"]),
        (["optim.lr=high"], ["optim.lr=high", "a number"]),
        (["schedule.floor=2"], ["schedule.floor=2"]),
        (["loss.z_loss=-1"], ["loss.z_loss=-1"]),
        (["loss.zloss=1"], ["loss.zloss", "did you mean 'z_loss'"]),
        (["callbacks.checkpoint.every_n_train_steps=0"], ["every_n_train_steps=0", "at least 1"]),
        ([*STOPPING, "callbacks.stop.patience=0"], ["early_stopping.patience=0", "at least 1"]),
        ([*STOPPING, "callbacks.stop.patience=soon"], ["callbacks.stop.patience=soon", "a whole number"]),
        ([*STOPPING, "callbacks.stop.min_delta=-1"], ["early_stopping.min_delta=-1", "at least 0"]),
        ([*STOPPING, "callbacks.stop.monitor=val/los"], ["callbacks.stop.monitor=val/los", "one of val/bpb, val/loss"]),
        ([*STOPPING, "trainer.limit_val_batches=0"], ["callbacks.stop", "limit_val_batches=0"]),
        (["seed=-1"], ["seed=-1"]),
        (["seed=abc"], ["seed=abc"]),
        (["seed=${nope}"], ["seed cannot be resolved", "nope"]),
        (["task_name=a/b"], ["task_name='a/b'"]),
        (["tags=abc"], ["tags='abc'"]),
        (["compile=maybe"], ["compile=maybe"]),
        (["activation_checkpointing=blocks"], ["activation_checkpointing=blocks is unknown", "did you mean 'block'"]),
        (["ckpt_path=lst"], ["ckpt_path=lst", "did you mean 'last'"]),
        (["logger.x=5"], ["logger.x has no _target_"]),
    ],
    ids=lambda value: " ".join(value) if "=" in value[0] else "",
)
def test_what_cannot_be_is_refused(overrides: list[str], words: list[str], default: DictConfig) -> None:
    found = problems_of_values(default, *overrides)
    assert any(all(word in problem for word in words) for problem in found), found
    keys = [problem.split("=")[0] for problem in found if "=" in problem]
    assert len(keys) == len(set(keys)), f"said twice: {found}"


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.vocab_size=auto", "tokenizer.vocab_size=9000"],
        ["tokenizer.vocab_size=4096", "model.vocab_size=600", "ckpt_path=last"],  # the text gave no more than 600
        ["trainer.max_time=00:00:10:00"],
        ["trainer.gradient_clip_val=null"],
        ["ckpt_path=last"],
        ["ckpt_path=auto"],
        ["tags=[a,b]"],
        ["compile=false"],
        ["activation_checkpointing=every_other"],
        ["seed=7", "task_name=my-run"],
    ],
    ids=lambda value: " ".join(value),
)
def test_what_can_be_is_accepted(overrides: list[str], default: DictConfig) -> None:
    assert problems_of_values(default, *overrides) == []


def test_the_tokenizer_is_as_large_as_the_model() -> None:
    def size(*overrides: str) -> int:
        return compose(overrides)["tokenizer"]["vocab_size"]

    assert size() == 4096
    assert size("model=d20") == 50257
    assert size("experiment=d20", "debug=fdr") == 4096  # which takes another model
    assert size("model=d20", "model.vocab_size=auto") == 4096
    assert size("model=d20", "tokenizer.vocab_size=300") == 300
    assert compose(["experiment=d20", "tokenizer=byte"])["tokenizer"] == {"_target_": "nanochat.data.tokenizer.Byte"}
    assert problems("data=synthetic", "model.vocab_size=64") == []


def test_early_stopping_where_there_is_no_text() -> None:
    [problem] = problems("callbacks=early_stopping", "data=synthetic")
    assert "callbacks.early_stopping.monitor=val/bpb needs text" in problem
    good = ["data=synthetic", "callbacks.early_stopping.monitor=val/loss", "callbacks.early_stopping.min_delta=1"]
    assert problems("callbacks=early_stopping", *good) == []


def test_a_warmup_is_refused_only_where_the_user_set_it() -> None:
    assert problems("trainer.max_steps=10") == []
    [problem] = problems("schedule.warmup_steps=20", "trainer.max_steps=10")
    assert "schedule.warmup_steps=20" in problem
    assert "trainer.max_steps=10" in problem


def test_a_device_that_is_not_there(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    [problem] = problems("trainer=gpu")
    assert "no such device" in problem
    assert "trainer=cpu" in problem


def test_wandb_needs_its_package_and_an_account(monkeypatch, tmp_path: Path) -> None:
    find_spec = rules.importlib.util.find_spec
    monkeypatch.setattr(rules.importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    [problem] = problems("logger=wandb")
    assert "nanochat[wandb]" in problem
    monkeypatch.setattr(rules.importlib.util, "find_spec", lambda name: name == "wandb" or find_spec(name))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    [problem] = problems("logger=wandb")
    assert "logger.wandb.offline=true" in problem
    assert problems("logger=wandb", "logger.wandb.offline=true") == []
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x")
    assert problems("logger=wandb") == []


@pytest.mark.parametrize(
    "overrides",
    [
        ["+mpt=on", "optim=mun", "data.batch_sise=2", "seed=-1", "trainer.max_steps=0"],
        ["model.n_heads=3", "+optim.momentun=1", "+trainer.callbacks=[]", "loss.z_loss=-1"],
    ],
    ids=["without torch", "with torch"],
)
def test_all_problems_are_reported_at_once(overrides: list[str]) -> None:
    """Those that need torch to be found only once there are no others."""
    found = problems(*overrides)
    for word in (override.lstrip("+").partition("=")[0] for override in overrides):
        assert any(word in problem for problem in found), (word, found)


def test_check_needs_no_hydra() -> None:
    check(OmegaConf.create(compose(["trainer.max_steps=10"])))
    with pytest.raises(ConfigError, match="did you mean 'trainer'"):
        check(OmegaConf.create({**compose(), "trainr": {}}))
