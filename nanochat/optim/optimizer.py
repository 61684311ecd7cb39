"""One torch optimizer for a whole run: every group of parameters is updated by its rule."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nanochat import ranks
from nanochat.errors import UserError
from nanochat.optim.distributed import Owners, gather_states
from nanochat.optim.offload import Away, leaves, visits
from nanochat.optim.options import option_fields
from nanochat.optim.rounding import Rounding
from nanochat.optim.rule import Group, Rule, State
from nanochat.optim.schedule import WEIGHT_DECAY_SCHEDULES
from nanochat.optim.sharded import Shards, is_sharded, part_shapes

log = logging.getLogger(__name__)


def tensor_bytes(state: State) -> int:
    """Bytes of the tensors of one parameter's state."""
    return sum(value.numel() * value.element_size() for value in state.values() if isinstance(value, Tensor))


class Optimizer(torch.optim.Optimizer):
    """Updates each group's parameters by the group's rule; there are no optimizers inside.

    Args:
        groups: as `nanochat.optim.build` makes them: `params`, `names`, `name`, `rule`, `lr`, `weight_decay`, the
            rule's options, and `auto`: names of options that were given as `auto` and decided by the device.
        rules: the rules by name.

    Attributes:
        skip_next: set it (also from within the closure) to True, and the step at hand is dropped: nothing changes but
            the count. False says that all gradients are known to be finite; None, which it is again after each step,
            that the step has to find out where states are quantised. That costs one host sync, the only one of a step.
        skipped_steps: dropped steps so far, part of the state.
        rounding: how parameters in bfloat16 are updated; None: as the rules do it. Set before the first step.
        offload: keep the states of parameters on a GPU in the CPU's memory. Set before the first step.

    The state dict holds tensors, numbers and strings, keyed by parameter name. Over several ranks (`distribute`) each
    parameter's state is with its owner, or, where sharded parameters are updated in parts, split like these;
    `state_dict` is that of all, on rank 0.
    """

    def __init__(self, groups: Sequence[Group], rules: dict[str, Rule]) -> None:
        self.rules = rules
        self.skip_next: bool | None = None
        self.skipped_steps = 0
        self.rounding: Rounding | None = None
        self.offload = False
        self.owners: Owners | None = None
        self._bytes_elsewhere: dict[Tensor, int] = {}
        self._state_bytes: dict[tuple[Any, ...], int] = {}
        for group in groups:
            group["base_lr"] = group["lr"]
            group["base_weight_decay"] = group["weight_decay"]
        super().__init__(list(groups), {})

    def distribute(self) -> None:
        """Share the parameters out among the ranks of this job, by the cost of their updates; before the first step."""
        if ranks.world() > 1:
            # what `auto` stands for was timed by each rank for itself, and must not differ
            options = [{key: value for key, value in g.items() if key != "params"} for g in self.param_groups]
            for group, agreed in zip(self.param_groups, ranks.same(options), strict=True):
                group.update(agreed)
            groups = [group["params"] for group in self.param_groups]
            costs = [[self.rules[g["rule"]].cost(g, p) for p in g["params"]] for g in self.param_groups]
            if any(is_sharded(parameter) for group in groups for parameter in group):
                self.owners = Shards(groups, costs, self._split_parameters())
            else:
                self.owners = Owners(groups, costs)

    def _split_parameters(self) -> list[Tensor]:
        """Of sharded parameters those whose rule lets each rank update its own rows."""
        count = ranks.world()
        return [p for g in self.param_groups for p in g["params"]
                if self.rules[g["rule"]].splits(g, part_shapes(p, count))]  # fmt: skip

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Run the closure, then one step, unless `skip_next` is set or a gradient would spoil a quantised state."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        owners = self.owners
        if owners is not None:
            owners.reduce()
        skip, self.skip_next = self.skip_next, None
        if skip is None:
            skip = bool(ranks.agreed(not self.gradients_fit(self.param_groups)))
        if skip:
            self.skipped_steps += 1
        else:
            for i, group in enumerate(self.param_groups):
                if owners is None:
                    self.step_group(group)
                else:
                    owners.update(i, partial(self._update, group))
        if owners is not None:
            if not skip:
                self._count_elsewhere(owners)
            owners.finish()
        return loss

    def gradients_fit(self, groups: Sequence[Group]) -> bool:
        """Whether no gradient of some groups would spoil a quantised state by NaN or Inf. A host sync if there are
        such states."""
        quantized = [group for group in groups if self.rules[group["rule"]].quantized]
        gradients = [ranks.own_part(p.grad) for group in quantized for p in group["params"] if p.grad is not None]
        # NaN and Inf survive a sum, which is one pass without a temporary
        sums = [gradient.sum(dtype=torch.float32) for gradient in gradients]
        return not sums or bool(torch.isfinite(torch.stack(sums)).all())

    @torch.no_grad()
    def step_group(self, group: Group) -> None:
        """Update one group's parameters that have a gradient."""
        used = [p for p in group["params"] if p.grad is not None]
        self._update(group, used, used, [p.grad for p in used])

    def _update(
        self, group: Group, members: Sequence[Tensor], parameters: list[Tensor], gradients: list[Tensor]
    ) -> None:
        """Update some parameters of a group.

        members: the group's own; parameters: what stands for them: themselves, or the rows that this rank has of them,
        or copies of sharded ones that are whole.
        """
        rule = self.rules[group["rule"]]
        firsts: dict[Tensor, int] = {}
        for member, parameter in zip(members, parameters, strict=True):
            firsts[parameter] = 0 if self.owners is None else self.owners.first(member)
            if not self.state[member]:
                index = next(i for i, one in enumerate(group["params"]) if one is member)
                self.state[member] = self.make_state(parameter, group, index)
        for part in visits(parameters, gradients, [self.state[member] for member in members]):
            if self.rounding is None:
                rule.step(group, *part)
            else:
                self.rounding.step(rule, group, *part, [firsts[parameter] for parameter in part[0]])
        # fused kernels do not: what is kept of a weight until it changes (its trits) goes by its version
        torch.autograd.graph.increment_version(parameters)

    def set_progress(self, step: int, max_steps: float, schedule: Callable[[int, float], float]) -> None:
        """Set every rate for a step, as functions of (step, max_steps) alone.

        Args:
            step: steps done so far; max_steps: of the whole run.
            schedule: (step, max_steps) -> factor on every group's learning rate.

        Also set: the weight decay by its schedule, and what else of a rule follows the step.
        """
        factor = schedule(step, max_steps)
        for group in self.param_groups:
            group["lr"] = group["base_lr"] * factor
            decay = WEIGHT_DECAY_SCHEDULES[group["weight_decay_schedule"]]
            group["weight_decay"] = group["base_weight_decay"] * decay(step, max_steps)
            self.rules[group["rule"]].set_progress(group, step, max_steps)

    def state_bytes(self, group: str | None = None) -> int:
        """Bytes of the state tensors of all groups or of one, on all ranks together; there are none before a
        parameter's first step. Counted again when there are states that were not there before."""
        key = (group, len(self.state), len(self._bytes_elsewhere))
        if key not in self._state_bytes:
            self._state_bytes[key] = sum(
                self._bytes_elsewhere.get(parameter, tensor_bytes(self.state.get(parameter, {})))
                for one in self.param_groups
                if group is None or one["name"] == group
                for parameter in one["params"]
            )
        return self._state_bytes[key]

    def planned_bytes(self) -> dict[str, int]:
        """Parameter name -> bytes of its state tensors after its first step: of the very tensors that the rule makes
        then, made on the meta device, so that nothing is allocated. Their sum will be `state_bytes()`."""
        return {
            name: tensor_bytes(self._planned_state(group, i, parameter))
            for group in self.param_groups
            for i, (name, parameter) in enumerate(zip(group["names"], group["params"], strict=True))
        }

    def _count_elsewhere(self, owners: Owners) -> None:
        """Note the bytes of the states that other ranks have made in this step, or a part of which is here."""
        for group in self.param_groups:
            for i, parameter in enumerate(group["params"]):
                if owners.used[parameter] and not owners.mine(parameter) and parameter not in self._bytes_elsewhere:
                    self._bytes_elsewhere[parameter] = tensor_bytes(self._planned_state(group, i, parameter))

    def _planned_state(self, group: Group, index: int, parameter: Tensor, shape: torch.Size | None = None) -> State:
        """The state of a parameter, or of a part of it that has some shape, on the meta device."""
        like = torch.empty(shape or parameter.shape, dtype=parameter.dtype, device="meta")
        return self.init_state(like, group, index)

    def init_state(self, parameter: Tensor, group: Group, index: int) -> State:
        """The state of a parameter, number `index` of its group, before its first step."""
        state = self.rules[group["rule"]].init(parameter, group, index)
        return state if self.rounding is None else state | self.rounding.init(group["names"][index], parameter)

    def make_state(self, parameter: Tensor, group: Group, index: int) -> State:
        """The same, where this run keeps it."""
        state = self.init_state(parameter, group, index)
        return Away(parameter.device, state) if self.offload and leaves(parameter.device) else state

    def _placed(self, state: State, device: torch.device) -> State:
        """A copy of the state of a parameter on a device, where this run keeps it."""
        if self.offload and leaves(device):
            return Away(device, state)
        return {key: v.detach().to(device, copy=True) if isinstance(v, Tensor) else v for key, v in state.items()}

    def _own_rows(self, state: State, group: Group, index: int, parameter: Tensor) -> State:
        """This rank's part of the state of a parameter that is split; empty where it has no rows."""
        shapes = part_shapes(parameter, ranks.world())[: ranks.rank() + 1]
        if not shapes[-1].numel():
            return {}
        own: State = {}
        parts = [self._planned_state(group, index, parameter, shape) for shape in shapes]
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim:
                sizes = [part[key].shape[0] for part in parts]
                value = value.narrow(0, sum(sizes[:-1]), sizes[-1])
            own[key] = value
        return own

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """{state: {parameter name: {key: tensor or number}}, groups: [...], skipped_steps}.

        Over several ranks all of them have to ask; `state` is whole on rank 0 and empty elsewhere.
        """
        if any(one.device.type == "cuda" for one in self.state.values() if isinstance(one, Away)):
            torch.cuda.synchronize()  # some may be on their way back
        state, groups = {}, []
        for group in self.param_groups:
            saved = {key: group[key] for key in ("name", "rule", *self._saved_options(group))}
            groups.append({**saved, "names": list(group["names"])})
            for name, parameter in zip(group["names"], group["params"], strict=True):
                if self.state.get(parameter):
                    state[name] = dict(self.state[parameter])
        if self.owners is not None:
            gathered = gather_states(state, self._split_names()) or {}
            state = {name: gathered[name] for group in groups for name in group["names"] if name in gathered}
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
        elsewhere: dict[Tensor, int] = {}
        split = self._split_names()
        for group in self.param_groups:
            for i, (name, parameter) in enumerate(zip(group["names"], group["params"], strict=True)):
                if name not in saved:
                    raise UserError(f"the checkpoint's optimizer state has no parameter {name}: it is another model's.")
                self._compare_groups(saved.pop(name), group, name)
                if name not in state_dict["state"]:
                    continue
                state = self._take_over(state_dict["state"][name], group, i, name, parameter)
                if self.owners is None or self.owners.mine(parameter):
                    new[parameter] = self._placed(state, parameter.device)
                    continue
                elsewhere[parameter] = tensor_bytes(state)
                if name in split and (rows := self._own_rows(state, group, i, parameter)):
                    new[parameter] = self._placed(rows, parameter.device)
        if saved:
            raise UserError(
                f"the checkpoint's optimizer state has a parameter {next(iter(saved))} that this run lacks."
            )
        self.state.clear()
        self.state.update(new)
        self._bytes_elsewhere = elsewhere
        self._state_bytes = {}
        self.skipped_steps = int(state_dict.get("skipped_steps", 0))

    def _split_names(self) -> set[str]:
        """The parameters of whose state each rank has a part."""
        split = self.owners.split if isinstance(self.owners, Shards) else ()
        return {name for g in self.param_groups for name, p in zip(g["names"], g["params"], strict=True) if p in split}

    def _saved_options(self, group: Group) -> dict[str, Any]:
        """Options that decide what a saved state means -> their value in states that were saved without them."""
        known = option_fields(self.rules[group["rule"]].Options)
        return {name: one.metadata["absent"] for name, one in known.items() if one.metadata.get("saved")}

    def _compare_groups(self, saved: dict[str, Any], group: Group, name: str) -> None:
        """Raise `UserError` where the options of a parameter's state are others; what this run left to the device
        is taken over from the checkpoint instead."""
        if saved["rule"] != group["rule"]:
            raise UserError(
                f"the checkpoint's optimizer updates {name} by {saved['rule']}, this run's by {group['rule']}; "
                "continue with the optimizer that the checkpoint was trained with."
            )
        for key, absent in self._saved_options(group).items():
            old, new = saved.get(key, absent), group[key]
            if old == new:
                continue
            if key not in group["auto"]:
                raise UserError(
                    f"the checkpoint's optimizer state of {name} has {key}={old}, "
                    f"this run has {key}={new}; set it to the checkpoint's."
                )
            group["auto"].remove(key)
            group[key] = old
            for member, parameter in zip(group["names"], group["params"], strict=True):
                self.rules[group["rule"]].check(group, member, parameter)
            log.warning(
                "optim.groups.%s.%s stays %s, as in the checkpoint; a new run on this machine would choose %s.",
                group["name"], key, old, new,
            )  # fmt: skip

    def _take_over(self, saved: State, group: Group, index: int, name: str, parameter: Tensor) -> State:
        """A saved state, with the keys in their order here; raises `UserError` where it is another parameter's."""
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
            state[key] = value
        return state
