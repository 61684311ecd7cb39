"""Rules between the fields of a configuration: small functions in `PLAIN_RULES`, which need no torch.

A rule takes `Values` and yields a `Problem` for each thing that is wrong. It reads a value with `number` or `node`,
which give None (`{}`) where the value is missing or already reported. What a constructor refuses by itself is not
repeated here: the rules of `nanochat.config.torch_rules` call the constructors.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeGuard

from nanochat.config.schema import NOTHING_TO_MINIMISE, UNRESOLVED, Problem, set_by_user, sweeper_minimises
from nanochat.config.takes_part import model_keys_take_part
from nanochat.config.vocabulary import SMALLEST_VOCABULARY
from nanochat.console import duration
from nanochat.environment import rank_count, ranks_started
from nanochat.errors import UserError, did_you_mean
from nanochat.reports import wandb_account


class Values:
    """The plain values of a configuration, and which of them have been found wrong."""

    def __init__(self, plain: dict[str, Any], problems: list[Problem]) -> None:
        self.plain, self.problems = plain, problems
        self.warnings: list[str] = []
        self.auto_batch = False

    def bad(self, key: str) -> bool:
        """Whether `key`, or anything below it, has a problem."""
        return any(problem.key == key or problem.key.startswith(f"{key}.") for problem in self.problems)

    def get(self, key: str) -> Any:
        """The value of a dotted key; None when it is missing or unresolved."""
        value: Any = self.plain
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return None if value is UNRESOLVED else value

    def number(self, key: str) -> int | float | None:
        """The value when it is a number."""
        value = self.get(key)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None

    def node(self, key: str) -> dict[str, Any]:
        """The value when it is a mapping without a problem, else `{}`."""
        value = self.get(key)
        return value if isinstance(value, dict) and not self.bad(key) else {}


AT_LEAST_ONE = ("trainer.accumulate_grad_batches", "trainer.max_steps")
NOT_NEGATIVE = ("trainer.gradient_clip_val", "optim.lr", "optim.weight_decay")
CHECKPOINTING = ("none", "feedforward", "every_other", "block")
"""`nanochat.model.checkpointing.MODES`, without torch"""
WEIGHTS = ("float32", "bfloat16", "bfloat16-master")
DEVICES = ("auto", "cpu", "cuda", "gpu", "mps")
EARLY_STOPPING = "nanochat.training.callbacks.early_stopping.EarlyStopping"


def counts(values: Values) -> Iterator[Problem]:
    """Counts that Lightning would refuse late, and rates."""
    for key in AT_LEAST_ONE:
        value = values.get(key)
        if key == "trainer.max_steps" and _ends_with_time(values) and value in (None, -1):
            continue
        given = value is not None or key == "trainer.max_steps"
        if given and not values.bad(key) and not (isinstance(value, int) and _is_whole(value) and value >= 1):
            yield Problem(key, f"{key}={'null' if value is None else value} must be a whole number of at least 1.")
    for key in NOT_NEGATIVE:
        value = values.number(key)
        if value is not None and not values.bad(key) and value < 0:
            yield Problem(key, f"{key}={value} must not be negative.")


def plain_keys(values: Values) -> Iterator[Problem]:
    """The keys that no target takes."""
    seed = values.get("seed")
    if "seed" in values.plain and not values.bad("seed") and not (_is_whole(seed) and 0 <= seed < 2**32):
        yield Problem("seed", f"seed={seed} must be a whole number from 0 to {2**32 - 1}.")
    name = values.get("task_name")
    if not values.bad("task_name") and name is not None and (not str(name).strip() or "/" in str(name)):
        text = f"task_name={name!r} must be a name without '/', since the run folder is named after it."
        yield Problem("task_name", text)
    tags = values.get("tags")
    if tags is not None and not (isinstance(tags, list) and all(isinstance(tag, str) for tag in tags)):
        yield Problem("tags", f"tags={tags!r} must be a list of texts, such as tags=[a,b].")
    mode = values.get("compile")
    if mode is not None and mode != "auto" and not isinstance(mode, bool):
        yield Problem("compile", f"compile={mode} must be auto, true or false.")
    mode = values.get("activation_checkpointing")
    if mode is not None and mode not in CHECKPOINTING:
        hint = did_you_mean(str(mode), CHECKPOINTING)
        yield Problem("activation_checkpointing", f"activation_checkpointing={mode} is unknown{hint}")
    kind = values.get("weights")
    if kind is not None and kind not in WEIGHTS:
        yield Problem("weights", f"weights={kind} is unknown{did_you_mean(str(kind), WEIGHTS)}")
    limit = values.get("rank_timeout")
    if limit is not None and (text := _bad_duration(limit)):
        yield Problem("rank_timeout", f"rank_timeout={text}")
    offload = values.get("offload_optimizer")
    if offload is not None and not isinstance(offload, bool):
        yield Problem("offload_optimizer", f"offload_optimizer={offload} must be true or false.")
    path = values.get("ckpt_path")
    if path is None or path in ("last", "auto"):
        return
    if not isinstance(path, str) or not Path(path).is_file():
        hint = did_you_mean(str(path), ["last", "auto"])
        hint = hint if "mean" in hint else "; give last, auto or a checkpoint file."
        yield Problem("ckpt_path", f"ckpt_path={path} is not a file{hint}")


def sequence_fits(values: Values) -> Iterator[Problem]:
    """The training sequence is no longer than the model's."""
    longest, length = values.number("model.seq_len"), values.number("data.seq_len")
    if longest is not None and length is not None and length > longest:
        text = f"data.seq_len={length} is longer than model.seq_len={longest}; shorten it or lengthen the model's."
        yield Problem("data.seq_len", text)


def predictions_fit(values: Values) -> Iterator[Problem]:
    """Further tokens are predicted inside of a training sequence."""
    tokens, length = values.number("mtp.tokens"), values.number("data.seq_len")
    if tokens is not None and length is not None and tokens >= length > 1:
        text = f"mtp.tokens={tokens} looks beyond the training sequences of data.seq_len={length}"
        yield Problem("mtp.tokens", f"{text}; at most {length - 1}.")


def vocabulary_fits(values: Values) -> Iterator[Problem]:
    """The tokenizer's vocabulary is no larger than the model's.

    A resumed run may have asked for more tokens than its text gave, and so than its model has; once the data is
    there, `fit_vocabulary` compares what it really has. Synthetic data has no tokenizer.
    """
    tokens, rows = values.number("tokenizer.vocab_size"), values.number("model.vocab_size")
    if values.get("ckpt_path") is not None or values.get("data.corpus") == "synthetic":
        return
    if tokens is not None and rows is not None and tokens > rows:
        yield Problem(
            "tokenizer.vocab_size",
            f"tokenizer.vocab_size={tokens} is larger than model.vocab_size={rows}; make it smaller (at least "
            f"{SMALLEST_VOCABULARY}), or say model.vocab_size=auto.",
        )


def warmup_fits(values: Values) -> Iterator[Problem]:
    """A preset's warm-up gives way to a short run; one that the user set does not."""
    steps, last = values.number("schedule.warmup_steps"), values.number("trainer.max_steps")
    if _ends_with_time(values):  # a tenth of a time is not known in steps
        return
    if steps is None or last is None or last < 1 or not set_by_user("schedule.warmup_steps"):
        return
    if steps > last:
        yield Problem(
            "schedule.warmup_steps",
            f"schedule.warmup_steps={steps} is longer than the run of trainer.max_steps={last}; "
            f"set at most a tenth of it, {last // 10}.",
        )
    elif steps > last // 10:
        cut = f"{last // 10}, a tenth of trainer.max_steps={last}"
        values.warnings.append(f"schedule.warmup_steps={steps} is cut to {cut}.")


def trainer_fits(values: Values) -> Iterator[Problem]:
    """What Lightning refuses late, or would do wrong without a word."""
    trainer = values.node("trainer")
    interval = trainer.get("val_check_interval")
    if (isinstance(interval, float) and not 0 < interval <= 1) or (isinstance(interval, int) and interval < 1):
        text = f"trainer.val_check_interval={interval} must be a number of optimizer steps, at least 1."
        yield Problem("trainer.val_check_interval", text)
    yield from _ranks_fit(trainer)
    limit = trainer.get("max_time")
    if limit is not None:
        if text := _bad_duration(limit):
            yield Problem("trainer.max_time", f"trainer.max_time={text}")
    elif _ends_with_time(values):
        text = "schedule.horizon=time needs the time: trainer.max_time=8h, for example."
        yield Problem("trainer.max_time", text)
    device = trainer.get("accelerator", "auto")
    if isinstance(device, str) and device not in DEVICES:
        text = f"trainer.accelerator={device} is unknown{did_you_mean(device, DEVICES)}"
        yield Problem("trainer.accelerator", text)


def _bad_duration(value: Any) -> str | None:
    """What is wrong with a length of time; None: nothing is."""
    try:
        duration(value)
    except UserError as error:
        return str(error)
    return None


def _ranks_fit(trainer: dict[str, Any]) -> Iterator[Problem]:
    """How many ranks there are to be, and who starts them."""
    devices, nodes = trainer.get("devices"), trainer.get("num_nodes")
    if isinstance(devices, list):
        good = bool(devices) and all(_is_whole(d) and d >= 0 for d in devices) and len(set(devices)) == len(devices)
    else:
        good = devices in (None, "auto") or (_is_whole(devices) and devices >= 1)
    if not good:
        text = f"trainer.devices={devices} must be the number of ranks, auto, or a list of different GPUs."
        yield Problem("trainer.devices", text)
        return
    if nodes is not None and not (_is_whole(nodes) and nodes >= 1):
        yield Problem("trainer.num_nodes", f"trainer.num_nodes={nodes} must be a whole number of at least 1.")
        return
    strategy = trainer.get("strategy")
    if strategy not in (None, "auto", "fsdp2"):
        text = f"trainer.strategy={strategy} is unknown: fsdp2 shards the model over the ranks, auto keeps it whole."
        yield Problem("trainer.strategy", text)
    started = ranks_started()
    if started == 1 and (nodes or 1) > 1:
        text = f"trainer.num_nodes={nodes} needs torchrun on each of the machines, see docs/distributed.md."
        yield Problem("trainer.num_nodes", text)
    if started > 1 and devices != "auto" and started != rank_count({"trainer": trainer}):
        text = f"{started} ranks were started, but trainer.devices={devices or 1} and trainer.num_nodes={nodes or 1}"
        yield Problem("trainer.devices", f"{text} ask for {rank_count({'trainer': trainer})}.")


def loggers_work(values: Values) -> Iterator[Problem]:
    """W&B has its package and, when it is online, an account."""
    for name, node in (values.get("logger") or {}).items():
        if not isinstance(node, dict) or not str(node.get("_target_", "")).endswith(".WandbLogger"):
            continue
        key = f"logger.{name}"
        if importlib.util.find_spec("wandb") is None:
            yield Problem(key, f"{key} needs the package wandb: pip install 'nanochat[wandb]', or choose logger=csv.")
        elif node.get("offline") != "auto" and not wandb_account.is_offline(node) and not wandb_account.has_account():
            yield Problem(key, f"{key} needs an account: run `wandb login`, or say {key}.offline=true.")


def early_stopping_sees_something(values: Values) -> Iterator[Problem]:
    """What ends a run early is validated, and measured."""
    nodes = values.get("callbacks")
    for name, node in nodes.items() if isinstance(nodes, dict) else ():
        if not isinstance(node, dict) or node.get("_target_") != EARLY_STOPPING:
            continue
        key = f"callbacks.{name}"
        if values.number("trainer.limit_val_batches") == 0:
            yield Problem(key, f"{key} waits for validations, but trainer.limit_val_batches=0 has none.")
        if node.get("monitor", "val/bpb") == "val/bpb" and values.get("data.corpus") == "synthetic":
            text = f"{key}.monitor=val/bpb needs text, and data=synthetic has none; use val/loss."
            yield Problem(f"{key}.monitor", text)


def sweeper_sees_something(values: Values) -> Iterator[Problem]:
    """What a sweeper minimises is measured."""
    if not sweeper_minimises():
        return
    if values.number("trainer.limit_val_batches") == 0:
        text = f"{NOTHING_TO_MINIMISE}: trainer.limit_val_batches=0 has no validation."
        yield Problem("trainer.limit_val_batches", text)
    if values.get("data.corpus") == "synthetic":
        yield Problem("data.corpus", f"{NOTHING_TO_MINIMISE}: data=synthetic has no text.")


def _ends_with_time(values: Values) -> bool:
    return values.get("schedule.horizon") == "time"


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


Rule = Callable[[Values], Iterator[Problem]]
PLAIN_RULES: list[Rule] = [
    counts,
    plain_keys,
    sequence_fits,
    predictions_fit,
    vocabulary_fits,
    warmup_fits,
    trainer_fits,
    model_keys_take_part,
    loggers_work,
    early_stopping_sees_something,
    sweeper_sees_something,
]
