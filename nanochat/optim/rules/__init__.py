"""The update rules, one file each: every `Rule` that a module of this folder defines can be named in a config."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from nanochat.errors import UserError, did_you_mean
from nanochat.optim.rule import Rule


def _rules_of(module: ModuleType) -> dict[str, type[Rule]]:
    """Class name -> rule that a module defines itself."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Rule) and value.__module__ == module.__name__
    }


RULES: dict[str, Rule] = {
    rule.name: rule()
    for found in pkgutil.iter_modules(__path__, __name__ + ".")
    for rule in _rules_of(importlib.import_module(found.name)).values()
}
"""the rules of this folder by name"""


def find_rule(name: object, where: str) -> Rule:
    """The rule of a config's `rule:`, a name in `RULES` or the dotted path of a class.

    Raises `UserError`, beginning with `where`, when there is no such rule.
    """
    if not isinstance(name, str) or "." not in name:
        if name not in RULES:
            raise UserError(f"{where}.rule={name!r} is unknown{did_you_mean(str(name), RULES)}")
        return RULES[name]  # type: ignore[index]
    path, _, class_name = name.rpartition(".")
    try:
        module = importlib.import_module(path)
    except Exception as error:  # whatever the user's own file raises
        raise UserError(f"{where}.rule={name}: {path} cannot be imported: {error}.") from error
    rule = getattr(module, class_name, None)
    if rule is None:
        raise UserError(
            f"{where}.rule={name}: {path} has no {class_name!r}{did_you_mean(class_name, _rules_of(module))}"
        )
    if not isinstance(rule, type) or not issubclass(rule, Rule):
        raise UserError(f"{where}.rule={name} must be a subclass of nanochat.optim.Rule.")
    return rule()
