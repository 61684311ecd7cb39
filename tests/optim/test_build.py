import pytest
import torch
from torch import nn

from nanochat.errors import ConfigError, UserError
from nanochat.optim import RULES, build
from tests.optim.helpers import NAMES, Net, config, make


def names(optimizer):
    return {group["name"]: group["names"] for group in optimizer.param_groups}


def test_first_match_claims_each_parameter_once():
    net = Net()
    net.add_module("hyper_maps", nn.Linear(4, 4))
    groups = names(make("muon", net))
    assert groups["hyper"] == ["gpt.hyper_maps.weight", "gpt.hyper_maps.bias"]
    assert groups["embedding"] == ["gpt.embedding.weight"]
    assert groups["head"] == ["gpt.head.weight"]
    assert groups["matrices"] == [f"gpt.blocks.{i}.{m}.weight" for i in (0, 1) for m in ("up", "down")]
    assert groups["scalars"] == ["gpt.blocks.0.norm.weight", "gpt.blocks.1.norm.weight", "gpt.norm.weight"]


def test_objectives_matrices_are_matrices():
    named = [(f"gpt.{n}", p) for n, p in Net().named_parameters()]
    named.append(("objectives.mtp.eh_proj.weight", nn.Parameter(torch.zeros(8, 16))))
    named.append(("objectives.mtp.blocks.0.norm.weight", nn.Parameter(torch.zeros(8))))
    groups = names(build(named, **config("muon")))
    assert "objectives.mtp.eh_proj.weight" in groups["matrices"]
    assert "objectives.mtp.blocks.0.norm.weight" in groups["scalars"]


def test_tied_table_has_a_rate_of_its_own():
    groups = {g["name"]: g for g in make("muon", Net(tied=True), tied_lr=0.011).param_groups}
    assert "embedding" not in groups
    assert "head" not in groups
    assert groups["tied_embedding"]["lr"] == 0.011


def test_rates():
    groups = {g["name"]: g for g in make("muon", Net(), lr=0.5, head_lr=0.25, scalar_lr=None).param_groups}
    assert groups["matrices"]["lr"] == 0.5
    assert groups["head"]["lr"] == 0.25
    assert groups["scalars"]["lr"] == 0.5, "a rate that is null is the main one"
    assert {g["lr"] for g in make("adamw", Net(), lr=0.007).param_groups} == {0.007}


def test_shared_options_are_defaults_that_groups_override():
    spec = {"head": {"match": "*head*", "rule": "adamw", "betas": [0.5, 0.6]}, "rest": {"rule": "adamw"}}
    groups = {g["name"]: g for g in build(Net().named_parameters(), lr=1, groups=spec, betas=(0.1, 0.2)).param_groups}
    assert groups["head"]["betas"] == (0.5, 0.6)
    assert groups["rest"]["betas"] == (0.1, 0.2)


def test_frozen_parameters_are_left_out():
    net = Net()
    net.blocks[0].up.weight.requires_grad_(False)
    assert "gpt.blocks.0.up.weight" not in names(make("muon", net))["matrices"]


BAD = [
    ({"groups": {"matrices": {"ndim": 2, "rule": "adamw"}}}, r"blocks\.0\.norm\.weight .*claimed by none"),
    ({"groups": {"x": {"match": "nothing*", "rule": "adamw"}, "rest": {"rule": "adamw"}}}, r"groups\.x matches no"),
    ({"groups": {"all": {"rule": "adamv"}}}, "adamv.*adamw"),
    (
        {"groups": {"all": {"rule": "adamw", "momentun": 0.9}}},
        r"^optim\.groups\.all\.momentun is not an option of",
    ),
    ({"groups": {"all": {"rule": "adamw", "opional": True}}}, "did you mean 'optional'"),
    ({"momentun": 0.9}, r"^optim\.momentun is not an option .*\(adamw, muon\); did you mean 'momentum'"),
    ({"weight_decai": 0.9}, "did you mean 'weight_decay'"),
    ({"haed_lr": 0.9}, r"^optim\.haed_lr is not used: .*; did you mean 'head_lr'"),
    ({"groups": {"all": {"rule": "adamw"}}, "betas": [0.9, 0.95], "tied_lr": 0.1}, r"optim\.tied_lr is not used"),
    ({"groups": {"all": {"rule": "adamw", "match": 5}}}, r"groups\.all\.match=5 must be a pattern"),
    ({"groups": {"all": {"rule": None}}}, "rule=None is unknown; there are adamw"),
    ({"groups": {"all": {"rule": "adamw"}}, "embedding_state": "8bit"}, "embedding_state is not used"),
    ({"ns_dtype": "float16"}, "ns_dtype='float16' is unknown; choose one of auto, float32, bfloat16"),
    (
        {"groups": {"all": {"rule": "adamw", "rate": "tail_lr"}}},
        r"all\.rate='tail_lr' is not a rate; there are lr",
    ),
    ({"groups": {"all": {"rule": "muon"}}}, r"norm\.weight has 1 dimension"),
    (
        {"groups": {"all": {"rule": "adamw"}}, "rank": 3},
        r"^optim\.rank is not an option .* rules \(adamw\)",
    ),
    ({"betas": [0.9, 1.0]}, r"betas.*\[0, 1\)"),
    ({"betas": [0.9]}, "two numbers"),
    ({"momentum": 1.0}, r"momentum=1\.0"),
    ({"momentum": float("nan")}, "momentum"),
    ({"lr": -1}, r"optim\.lr=-1"),
    ({"lr": "fast"}, r"optim\.lr='fast'"),
    ({"eps": -1e-8}, "eps"),
    ({"eps": 0}, "eps=0 must be more than 0"),
    ({"groups": {"all": None}}, "groups.all=None is not a group"),
    ({"groups": {"all": 5}}, "groups.all=5 is not a group"),
    ({"groups": {"all": {"rule": "adamw", "tied": "maybe"}}}, "all.tied='maybe' must be true or false"),
    ({"groups": {"all": {"rule": "adamw", "optional": 1}}}, "all.optional=1 must be"),
    ({"groups": {"all": {"rule": "adamw", "ndim": "2"}}}, "all.ndim='2' must be a whole number"),
    ({"ns_steps": 0}, "ns_steps=0"),
    ({"newton_schulz": "quintic"}, "quintic.*polar_express"),
    ({"newton_schulz": "polar_express", "ns_steps": 3}, "ns_steps=3 is too few"),
    ({"nesterov": "yes"}, "nesterov.*true or false"),
    ({"weight_decay": -0.1}, "weight_decay"),
    ({"weight_decay_schedule": "half"}, "first_half"),
    ({"embedding_state": "int4"}, "embedding_state"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[str(list(c)) for c, _ in BAD])
def test_bad_configurations_are_named(changes, message):
    if "betas" in changes or "eps" in changes:
        changes = {"groups": {"all": {"rule": "adamw"}}, "lr": 1.0, **changes}
        with pytest.raises(UserError, match=message):
            build(Net().named_parameters(), **changes)
        return
    base = config("muon")
    if "groups" in changes:
        base = {"lr": 1.0}
    with pytest.raises(UserError, match=message):
        build([(f"gpt.{n}", p) for n, p in Net().named_parameters()], **{**base, **changes})


def test_all_unknown_keys_are_named_at_once():
    with pytest.raises(ConfigError) as found:
        make("muon", Net(), momentun=0.9, rank=3, haed_lr=1.0)
    assert sorted(problem.split()[0] for problem in found.value.problems) == [
        "optim.haed_lr",
        "optim.momentun",
        "optim.rank",
    ]


def test_a_null_is_not_given():
    """In a group it leaves the shared value, at the top the rule's default."""
    groups = {"head": {"match": "*head*", "rule": "adamw", "betas": None}, "rest": {"rule": "adamw", "eps": None}}
    built = build(Net().named_parameters(), lr=1, groups=groups, betas=(0.1, 0.2), eps=None).param_groups
    assert [(group["betas"], group["eps"]) for group in built] == [((0.1, 0.2), 1e-8)] * 2


def test_every_rule_is_shipped_as_an_optimizer():
    assert {config(name)["groups"]["matrices"]["rule"] for name in NAMES} == set(RULES) == set(NAMES)
