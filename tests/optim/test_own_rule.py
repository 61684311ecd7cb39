"""A rule that a user's own package defines: named by its path, checked, trained, saved and resumed."""

import sys
import textwrap

import pytest
import torch

from nanochat.errors import UserError
from nanochat.optim import build
from tests.optim.helpers import Net, config, reloaded, train

SOURCE = """
from nanochat.optim import Rule
from nanochat.optim.options import choice, number
from nanochat.optim.rule import zeros_like


class Sign(Rule):
    '''w <- w - lr sign(m), m <- b m + (1 - b) g.'''

    class Options:
        momentum: float = number(0.9, 0.0, 1.0, open_end=True)
        form: str = choice("auto", "sign", "plain", saved=True)
        note: str = "as it is"

    def auto(self, device):
        return {"form": "sign"}

    def init(self, parameter, group, index):
        return {"momentum": zeros_like(parameter)}

    def step(self, group, parameters, gradients, states):
        for parameter, gradient, state in zip(parameters, gradients, states):
            state["momentum"].lerp_(gradient, 1.0 - group["momentum"])
            update = state["momentum"].sign() if group["form"] == "sign" else state["momentum"]
            parameter.sub_(update, alpha=group["lr"])


class NotARule:
    pass
"""


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "__init__.py").touch()
    (tmp_path / "own_package" / "rules.py").write_text(textwrap.dedent(SOURCE))
    (tmp_path / "own_package" / "broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.startswith("own_package")]:
        del sys.modules[name]


def optimizer_of(net, rule="own_package.rules.Sign", shared=None, **options):
    groups = config("muon")["groups"]
    groups["matrices"] = {"ndim": 2, "rule": rule, **options}
    rates = {k: v for k, v in config("muon").items() if k.endswith("lr")} | {"lr": 0.003}
    return build([(f"gpt.{n}", p) for n, p in net.named_parameters()], **rates, groups=groups, **(shared or {}))


def test_learns_and_resumes_bit_equal():
    net = Net()
    optimizer = optimizer_of(net, shared={"momentum": 0.8})
    group = next(group for group in optimizer.param_groups if group["name"] == "matrices")
    assert (group["momentum"], group["form"], group["note"]) == (0.8, "sign", "as it is")
    losses = train(net, optimizer, 0, 30)
    assert losses[-1] < losses[0] - 0.3
    saved = next(g for g in optimizer.state_dict()["groups"] if g["name"] == "matrices")
    assert (saved["rule"], saved["form"]) == ("own_package.rules.Sign", "sign")
    again, loaded = reloaded(net, optimizer, lambda network: optimizer_of(network, momentum=0.8))
    assert train(net, optimizer, 30, 5) == train(again, loaded, 30, 5)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (
            "own_package.rules.Sign",
            {"momentum": 2},
            r"^optim\.groups\.matrices\.momentum=2 must be a number in \[0, 1\)",
        ),
        ("own_package.rules.Sign", {"form": "sine"}, "form='sine' is unknown; choose one of auto, sign, plain"),
        (
            "own_package.rules.Sign",
            {"momentun": 0.5},
            r"^optim\.groups\.matrices\.momentun is not an option of rule own_package\.rules\.Sign; .*'momentum'",
        ),
        ("own_package.rules.Sing", {}, r"rule=own_package\.rules\.Sing: own_package\.rules has no 'Sing'.*'Sign'"),
        ("own_package.rule.Sign", {}, r"own_package\.rule cannot be imported: No module named"),
        ("own_package.broken.Sign", {}, r"own_package\.broken cannot be imported: division by zero"),
        ("own_package.rules.NotARule", {}, r"must be a subclass of nanochat\.optim\.Rule"),
    ],
)
def test_mistakes_are_named(rule, options, message):
    with pytest.raises(UserError, match=message):
        optimizer_of(Net(), rule, **options)


@pytest.mark.parametrize("options", ["", "class Options(Muon.Options):\n        extra: float = 1.0"])
@pytest.mark.parametrize("decorator", ["", "@dataclass(frozen=True)\n    "])
def test_a_rule_may_extend_ours(tmp_path, options, decorator):
    body = decorator + options if options else "pass"
    source = (
        f"from dataclasses import dataclass\nfrom nanochat.optim.rules.muon import Muon\nclass Own(Muon):\n    {body}\n"
    )
    (tmp_path / "own_package" / "extended.py").write_text(source)
    net = Net()
    optimizer = optimizer_of(net, "own_package.extended.Own", momentum=0.8)
    group = next(group for group in optimizer.param_groups if group["name"] == "matrices")
    assert (group["rule"], group["momentum"], group["ns_dtype"]) == ("own_package.extended.Own", 0.8, "float32")
    assert group.get("extra") == (1.0 if options else None)
    assert train(net, optimizer, 0, 20)[-1] < 4.0
    for rule in ("own_package.extended.Own", "muon"):
        with pytest.raises(UserError, match=r"momentum=2 must be a number in \[0, 1\)"):
            optimizer_of(Net(), rule, momentum=2)


def test_its_state_is_no_other_rule_s():
    net = Net()
    own = optimizer_of(net)
    train(net, own, 0, 1)
    with pytest.raises(UserError, match=r"by own_package\.rules\.Sign, this run's by lion"):
        optimizer_of(net, "lion").load_state_dict(own.state_dict())
