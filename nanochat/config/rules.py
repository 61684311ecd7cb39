"""Rules between the fields of a configuration: small functions in `RULES`, to which a feature adds its own.

A rule takes `Values` and yields sentences. It is called after every key has been compared with its target, and
reads a value with `number`, `text` or `node`, which give None where the value is missing or already reported.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nanochat.config.schema import NODE_GROUPS, UNRESOLVED, set_by_user
from nanochat.config.vocabulary import SMALLEST_VOCABULARY
from nanochat.errors import ConfigError, UserError, did_you_mean

log = logging.getLogger(__name__)


class Values:
    """The plain values of a configuration, and which of them have been found wrong."""

    def __init__(self, plain: dict[str, Any], problems: list[str]) -> None:
        self.plain, self.problems = plain, problems

    def add(self, problem: str) -> None:
        """One more problem."""
        self.problems.append(problem)

    def bad(self, key: str) -> bool:
        """Whether `key`, or anything below it, has a problem."""
        return any(re.match(rf"{re.escape(key)}(?![\w-])", problem) for problem in self.problems)

    def get(self, key: str) -> Any:
        """The value of a dotted key; None when it is missing or unresolved."""
        value: Any = self.plain
        for part in key.split("."):
            if isinstance(value, list) and part.isdigit() and int(part) < len(value):
                value = value[int(part)]
            else:
                value = value.get(part) if isinstance(value, dict) else None
        return None if value is UNRESOLVED else value

    def number(self, key: str) -> int | float | None:
        """The value when it is a number."""
        value = self.get(key)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None

    def text(self, key: str) -> str | None:
        """The value when it is a text."""
        value = self.get(key)
        return value if isinstance(value, str) else None

    def node(self, key: str) -> dict[str, Any]:
        """The value when it is a mapping without a problem, else `{}`."""
        value = self.get(key)
        return value if isinstance(value, dict) and not self.bad(key) else {}


AT_LEAST_ONE = (
    "model.vocab_size",
    "model.dim",
    "model.n_layers",
    "model.n_heads",
    "model.n_kv_heads",
    "model.ffn_dim",
    "model.seq_len",
    "data.seq_len",
    "data.batch_size",
    "tokenizer.vocab_size",
    "trainer.max_steps",
    "trainer.accumulate_grad_batches",
    "callbacks.checkpoint.every_n_train_steps",
    "mtp.tokens",
    "mhc.streams",
)
EARLY_STOPPING = "nanochat.training.callbacks.early_stopping.EarlyStopping"
NOT_NEGATIVE = ("optim.lr", "optim.weight_decay", "trainer.gradient_clip_val", "schedule.warmup_steps", "mtp.weight")


def sizes(values: Values) -> Iterator[str]:
    """Counts are whole and positive, rates are not negative."""
    for key in AT_LEAST_ONE:
        value = values.get(key)
        if value is None or value == "auto" or values.bad(key):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            yield f"{key}={value} must be a whole number of at least 1."
    for key in NOT_NEGATIVE:
        value = values.number(key)
        if value is not None and not values.bad(key) and not value >= 0:
            yield f"{key}={value} must not be negative."


def plain_keys(values: Values) -> Iterator[str]:
    """The keys that no target takes."""
    seed = values.get("seed")
    if (
        "seed" in values.plain
        and not values.bad("seed")
        and (not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32)
    ):
        yield f"seed={seed} must be a whole number from 0 to {2**32 - 1}."
    name = values.get("task_name")
    if not values.bad("task_name") and name is not None and (not str(name).strip() or "/" in str(name)):
        yield f"task_name={name!r} must be a name without '/', since the run folder is named after it."
    tags = values.get("tags")
    if tags is not None and not (isinstance(tags, list) and all(isinstance(tag, str) for tag in tags)):
        yield f"tags={tags!r} must be a list of words, such as tags=[a,b]."
    mode = values.get("compile")
    if mode is not None and mode != "auto" and not isinstance(mode, bool):
        yield f"compile={mode} must be auto, true or false."
    path = values.get("ckpt_path")
    if path is None or path in ("last", "auto"):
        return
    if not isinstance(path, str) or not Path(path).is_file():
        hint = did_you_mean(str(path), ["last", "auto"])
        yield f"ckpt_path={path} is not a file{hint if 'mean' in hint else '; give last, auto or a checkpoint file.'}"


def sequence_fits(values: Values) -> Iterator[str]:
    """The training sequence is no longer than the model's."""
    longest, length = values.number("model.seq_len"), values.number("data.seq_len")
    if longest is not None and length is not None and length > longest:
        yield f"data.seq_len={length} is longer than model.seq_len={longest}; shorten it or lengthen the model's."


def predictions_fit(values: Values) -> Iterator[str]:
    """Further tokens are predicted inside of a training sequence."""
    tokens, length = values.number("mtp.tokens"), values.number("data.seq_len")
    if tokens is not None and length is not None and tokens >= length:
        yield f"mtp.tokens={tokens} looks beyond the training sequences of data.seq_len={length}; at most {length - 1}."


def vocabulary_fits(values: Values) -> Iterator[str]:
    """The tokenizer's vocabulary is no larger than the model's.

    A run that goes on may have asked for more tokens than its text gave, and so than its model has; once the data is
    there, `run.fit_vocabulary` compares what it really has. Synthetic data has no tokenizer.
    """
    tokens, rows = values.number("tokenizer.vocab_size"), values.number("model.vocab_size")
    if values.get("ckpt_path") is not None or values.get("data.corpus") == "synthetic":
        return
    if tokens is not None and rows is not None and tokens > rows:
        yield (
            f"tokenizer.vocab_size={tokens} is larger than model.vocab_size={rows}; make it smaller (at least "
            f"{SMALLEST_VOCABULARY}), or say model.vocab_size=auto."
        )


def warmup_fits(values: Values) -> Iterator[str]:
    """A preset's warm-up gives way to a short run; one that the user set does not."""
    steps, last = values.number("schedule.warmup_steps"), values.number("trainer.max_steps")
    if steps is None or last is None or last < 1 or not set_by_user("schedule.warmup_steps"):
        return
    if steps > last:
        yield (
            f"schedule.warmup_steps={steps} is longer than the run of trainer.max_steps={last}; "
            f"set at most a tenth of it, {last // 10}."
        )
    elif steps > last // 10:
        log.warning("schedule.warmup_steps=%d is cut to %d, a tenth of trainer.max_steps=%d.", steps, last // 10, last)


def trainer_fits(values: Values) -> Iterator[str]:
    """What Lightning refuses later, or would do silently wrong."""
    trainer = values.node("trainer")
    interval = trainer.get("val_check_interval")
    if (isinstance(interval, float) and not 0 < interval <= 1) or (isinstance(interval, int) and interval < 1):
        yield f"trainer.val_check_interval={interval} must be a number of optimizer steps, at least 1."
    devices = trainer.get("devices")
    if devices not in (None, 1, "1", "auto") and not (isinstance(devices, list) and len(devices) == 1):
        yield f"trainer.devices={devices} must be 1 (or a list of one index): a run trains on one device."
    if trainer.get("max_time") is not None and not isinstance(trainer["max_time"], dict):
        import lightning.pytorch.callbacks

        try:
            lightning.pytorch.callbacks.Timer(trainer["max_time"])
        except Exception:
            yield f"trainer.max_time={trainer['max_time']} must be DD:HH:MM:SS, such as '00:01:30:00'."
    if "max_steps" in trainer and trainer.get("max_steps") is None:
        yield "trainer.max_steps=null must be a whole number of at least 1."


def device_exists(values: Values) -> Iterator[str]:
    """The chosen device is there, and can compute in the chosen precision."""
    import torch

    trainer = values.node("trainer")
    device = trainer.get("accelerator", "auto")
    known = ("auto", "cpu", "cuda", "gpu", "mps")
    if not trainer or not isinstance(device, str):
        return
    if device not in known:
        yield f"trainer.accelerator={device} is unknown{did_you_mean(device, known)}"
        return
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    missing = {"cuda": not cuda, "gpu": not (cuda or mps), "mps": not mps}.get(device, False)
    if missing:
        yield f"trainer.accelerator={device}: this machine has no such device; choose trainer=cpu or trainer=auto."
    precision = str(trainer.get("precision", ""))
    if precision.startswith("16") and (device == "cpu" or (device == "auto" and not cuda)):
        yield f"trainer.precision={precision} needs a GPU; use bf16-mixed, 32-true or auto."


def loggers_work(values: Values) -> Iterator[str]:
    """W&B has its package and, when it is online, an account."""
    for name, node in (values.get("logger") or {}).items():
        if not isinstance(node, dict) or not str(node.get("_target_", "")).endswith(".WandbLogger"):
            continue
        key = f"logger.{name}"
        if importlib.util.find_spec("wandb") is None:
            yield f"{key} needs the package wandb: pip install 'nanochat[wandb]', or choose logger=csv."
        elif not node.get("offline") and not _wandb_is_offline() and not _wandb_account():
            yield f"{key} needs an account: run `wandb login`, or say {key}.offline=true."


def _wandb_is_offline() -> bool:
    return os.environ.get("WANDB_MODE", "").lower() in ("offline", "disabled", "dryrun")


def _wandb_account() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    files = [Path(os.environ["NETRC"])] if "NETRC" in os.environ else [Path.home() / n for n in (".netrc", "_netrc")]
    return any(path.is_file() and "wandb" in path.read_text(errors="replace") for path in files)


def early_stopping_sees_something(values: Values) -> Iterator[str]:
    """What ends a run early is validated, and measured."""
    nodes = values.get("callbacks")
    for name, node in nodes.items() if isinstance(nodes, dict) else ():
        if not isinstance(node, dict) or node.get("_target_") != EARLY_STOPPING:
            continue
        if values.number("trainer.limit_val_batches") == 0:
            yield f"callbacks.{name} waits for validations, but trainer.limit_val_batches=0 has none."
        if node.get("monitor", "val/bpb") == "val/bpb" and values.get("data.corpus") == "synthetic":
            yield f"callbacks.{name}.monitor=val/bpb needs text, and data=synthetic has none; use val/loss."


def model_is_possible(values: Values) -> Iterator[str]:
    """The network's own rules: heads divide the width, key/value heads divide the heads, ..."""
    node = values.node("model")
    if node:
        yield from _tried(lambda: _model(values), "model")


def parts_are_possible(values: Values) -> Iterator[str]:
    """What the constructors of the small parts refuse."""
    from hydra.utils import instantiate
    from lightning import Callback

    from nanochat.training.module import feature_nodes

    groups = [("schedule", values.node("schedule"))]
    for group in NODE_GROUPS[1:]:
        nodes = values.get(group)
        names = nodes if isinstance(nodes, dict) else {}
        groups += [(f"{group}.{name}", values.node(f"{group}.{name}")) for name in names]
    sound = {key: values.node(key) for key in values.plain}
    groups += feature_nodes(sound, Callback).items()  # those that are objectives are built with the optimizer
    tokenizer = values.node("tokenizer")
    groups.append(("tokenizer", tokenizer))
    for key, node in groups:
        if node:
            yield from _tried(lambda node=node: instantiate(node), key)
    if values.node("data") and tokenizer:
        yield from _tried(lambda: _data(values), "data")


def loss_is_possible(values: Values) -> Iterator[str]:
    """What the next-token objective refuses."""
    from nanochat.model import GPTConfig
    from nanochat.objectives import NextToken

    if values.node("loss"):
        yield from _tried(lambda: NextToken(GPTConfig(), **values.node("loss")), "loss")


def optimizer_is_possible(values: Values) -> Iterator[str]:
    """Rules, ranks and groups against the parameters of this very model, on the meta device."""
    needed = ("model", "optim", "schedule", "trainer", "loss")
    if any(values.bad(key) for key in needed) or not values.node("model") or not values.node("optim"):
        return
    import torch

    from nanochat.training.module import NanoChatModule

    plain = {key: value for key, value in values.plain.items() if not values.bad(key)}
    plain["model"] = _sized(values)

    def build() -> None:
        with torch.device("meta"):
            NanoChatModule(plain).configure_optimizers()

    yield from _tried(build, "optim")


def _sized(values: Values) -> dict[str, Any]:
    """The model's node with a number where its vocabulary is `auto`."""
    node = dict(values.node("model"))
    if node.get("vocab_size") == "auto":
        try:
            node["vocab_size"] = _data(values).planned_vocab_size
        except Exception:  # `parts_are_possible` says what is wrong with it
            node["vocab_size"] = 257
    return node


def _data(values: Values) -> Any:
    """The DataModule, with nothing read or written."""
    from hydra.utils import instantiate

    node, tokenizer = values.node("data"), values.node("tokenizer")
    return instantiate(node, _partial_=True, _convert_="all")(tokenizer=instantiate(tokenizer))


def _model(values: Values) -> None:
    from nanochat.model import GPTConfig

    GPTConfig.from_dict({key: value for key, value in _sized(values).items() if not key.startswith("_")})


def _tried(build: Callable[[], Any], key: str) -> Iterator[str]:
    """Problems that building something raises."""
    try:
        build()
    except ConfigError as error:
        yield from error.problems
    except UserError as error:
        yield str(error)
    except Exception as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        if isinstance(cause, ConfigError):
            yield from cause.problems
        elif isinstance(cause, UserError):
            yield str(cause)
        else:
            line = (str(cause).strip().splitlines() or [type(cause).__name__])[0].rstrip(".")
            yield f"{key} cannot be used: {line}."


RULES: list[Callable[[Values], Iterator[str]]] = [
    sizes,
    plain_keys,
    sequence_fits,
    predictions_fit,
    vocabulary_fits,
    warmup_fits,
    trainer_fits,
    device_exists,
    loggers_work,
    early_stopping_sees_something,
    model_is_possible,
    loss_is_possible,
    parts_are_possible,
    optimizer_is_possible,
]
"""the order matters: rules that build a part come after those that look at its numbers"""
