"""One torch optimizer for a whole run: every group of parameters moves by its rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nanochat.errors import UserError
from nanochat.optim.rule import Group, Rule, State
from nanochat.optim.schedule import WEIGHT_DECAY_SCHEDULES

MATCHED = ("kernels", "block_size", "rank")
"""options that decide what a saved state means"""


def tensor_bytes(state: State) -> int:
    """Bytes of the tensors of one parameter's state."""
    return sum(value.numel() * value.element_size() for value in state.values() if isinstance(value, Tensor))


class Optimizer(torch.optim.Optimizer):
    """Moves each group's parameters by the group's rule; there are no optimizers inside.

    Args:
        groups: as `nanochat.optim.build` makes them: `params`, `names`, `name`, `rule`, `lr`, `weight_decay` and the
            rule's options.
        rules: the rules by name.

    Attributes:
        skip_next: set it (also from within the closure) to drop the step at hand: nothing changes but the count.
        skipped_steps: dropped steps so far, part of the state.

    The state dict holds tensors, numbers and strings, keyed by parameter name.
    """

    def __init__(self, groups: Sequence[Group], rules: dict[str, Rule]) -> None:
        self.rules = rules
        self.skip_next = False
        self.skipped_steps = 0
        for group in groups:
            group["base_lr"] = group["lr"]
            group["base_weight_decay"] = group["weight_decay"]
            if "momentum" in group:
                group["momentum_now"] = group["momentum"]
        super().__init__(list(groups), {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Run the closure, then one step, unless `skip_next` is set or a gradient would spoil a quantised state."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.skip_next or not all(self.gradients_fit(group) for group in self.param_groups):
            self.skip_next = False
            self.skipped_steps += 1
            return loss
        for group in self.param_groups:
            self.step_group(group)
        return loss

    def gradients_fit(self, group: Group) -> bool:
        """Whether no gradient of the group would spoil a quantised state by NaN or Inf."""
        if not self.rules[group["rule"]].quantized:
            return True
        # NaN and Inf survive a sum, which is one pass without a temporary
        sums = [p.grad.sum(dtype=torch.float32) for p in group["params"] if p.grad is not None]
        return not sums or bool(torch.isfinite(torch.stack(sums)).all())

    @torch.no_grad()
    def step_group(self, group: Group) -> None:
        """Move one group's parameters that have a gradient."""
        rule = self.rules[group["rule"]]
        moved = [(i, p) for i, p in enumerate(group["params"]) if p.grad is not None]
        for i, parameter in moved:
            if not self.state[parameter]:
                self.state[parameter] = rule.init(parameter, group, i)
        parameters = [parameter for _, parameter in moved]
        rule.step(group, parameters, [p.grad for p in parameters], [self.state[p] for p in parameters])

    def set_progress(self, step: int, max_steps: int, schedule: Callable[[int, int], float]) -> None:
        """Set every rate for a step, as functions of (step, max_steps) alone.

        Args:
            step: steps done so far; max_steps: of the whole run.
            schedule: (step, max_steps) -> factor on every group's learning rate.

        Also set: the weight decay by its schedule, and the momentum during its warm-up.
        """
        factor = schedule(step, max_steps)
        for group in self.param_groups:
            group["lr"] = group["base_lr"] * factor
            decay = WEIGHT_DECAY_SCHEDULES[group["weight_decay_schedule"]]
            group["weight_decay"] = group["base_weight_decay"] * decay(step, max_steps)
            if group.get("momentum_start") is not None:
                done = min(1.0, step / max(1, group["momentum_warmup"]))
                start = group["momentum_start"]
                group["momentum_now"] = start + (group["momentum"] - start) * done

    def state_bytes(self, group: str | None = None) -> int:
        """Bytes of all state tensors, or of one group's; nothing is allocated before a parameter's first step."""
        return sum(
            tensor_bytes(self.state.get(parameter, {}))
            for one in self.param_groups
            if group is None or one["name"] == group
            for parameter in one["params"]
        )

    def planned_bytes(self) -> dict[str, int]:
        """Parameter name -> bytes of its state tensors once it has moved: of the very tensors that the rule makes then,
        made on the meta device, so that nothing is allocated. Their sum will be `state_bytes()`."""
        return {
            name: tensor_bytes(self._planned_state(group, i, parameter))
            for group in self.param_groups
            for i, (name, parameter) in enumerate(zip(group["names"], group["params"], strict=True))
        }

    def _planned_state(self, group: Group, index: int, parameter: Tensor) -> State:
        return self.rules[group["rule"]].init(torch.empty_like(parameter, device="meta"), group, index)

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """{state: {parameter name: {key: tensor or number}}, groups: [...], skipped_steps}."""
        state, groups = {}, []
        for group in self.param_groups:
            described = {key: group[key] for key in ("name", "rule", *MATCHED) if key in group}
            groups.append({**described, "names": list(group["names"])})
            for name, parameter in zip(group["names"], group["params"], strict=True):
                if self.state.get(parameter):
                    state[name] = dict(self.state[parameter])
        return {"state": state, "groups": groups, "skipped_steps": self.skipped_steps}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """Take over a saved state with every dtype as it was (torch's own casts it to the parameter's).

        Raises `UserError` when it is the state of other parameters, of another rule or of other blocks or ranks.
        """
        if not isinstance(state_dict.get("groups"), list) or not isinstance(state_dict.get("state"), dict):
            raise UserError("the checkpoint's optimizer state was not written by this optimizer.")
        saved = {name: group for group in state_dict["groups"] for name in group["names"]}
        new: dict[Tensor, State] = {}
        for group in self.param_groups:
            for i, (name, parameter) in enumerate(zip(group["names"], group["params"], strict=True)):
                if name not in saved:
                    raise UserError(f"the checkpoint's optimizer state has no parameter {name}: it is another model's.")
                self._compare_groups(saved.pop(name), group, name)
                if name in state_dict["state"]:
                    new[parameter] = self._take_over(state_dict["state"][name], group, i, name, parameter)
        if saved:
            raise UserError(
                f"the checkpoint's optimizer state has a parameter {next(iter(saved))} that this run lacks."
            )
        self.state.clear()
        self.state.update(new)
        self.skipped_steps = int(state_dict.get("skipped_steps", 0))

    @staticmethod
    def _compare_groups(saved: dict[str, Any], group: Group, name: str) -> None:
        if saved["rule"] != group["rule"]:
            raise UserError(
                f"the checkpoint's optimizer moves {name} by {saved['rule']}, this run's by {group['rule']}; "
                "continue with the optimizer that the checkpoint was trained with."
            )
        for key in MATCHED:
            if saved.get(key) != group.get(key):
                raise UserError(
                    f"the checkpoint's optimizer state of {name} has {key}={saved.get(key)}, "
                    f"this run has {key}={group.get(key)}; set it to the checkpoint's."
                )

    def _take_over(self, saved: State, group: Group, index: int, name: str, parameter: Tensor) -> State:
        expected = self._planned_state(group, index, parameter)
        if set(saved) != set(expected):
            difference = ", ".join(sorted(set(saved) ^ set(expected)))
            raise UserError(
                f"the checkpoint's optimizer state of {name} was written with other options of {group['rule']} "
                f"(differing: {difference})."
            )
        state: State = {}
        for key, like in expected.items():
            value = saved[key]
            if not isinstance(like, Tensor):
                state[key] = value
                continue
            if not isinstance(value, Tensor) or value.shape != like.shape or value.dtype != like.dtype:
                found = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(value)
                raise UserError(
                    f"the checkpoint's optimizer state of {name} has {key} {found}, "
                    f"this run needs {tuple(like.shape)} {like.dtype}: it is of another model or of other options."
                )
            state[key] = value.detach().to(parameter.device, copy=True)
        return state
