"""Every option of conf/ composes and follows the rules of the house."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from nanochat.config import rules
from nanochat.config.compose import compose
from nanochat.config.schema import CONF, DEFAULTS, TARGET_GROUPS, features

GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")
OPTIONS = sorted((path.parent.name, path.stem) for group in GROUPS for path in (CONF / group).glob("*.yaml"))
FILES = sorted(CONF.rglob("*.yaml"))
FEATURES = sorted(features())


def choose(group: str, option: str) -> str:
    return f"{'+' if group in FEATURES else ''}{group}={option}"


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
