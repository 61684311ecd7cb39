"""Continuous batching: requests join and leave between the steps of one network.

A step reads the next pieces of new prompts and writes one token for every request that is under way. A request's
result depends on itself alone: its generator is its own, and so is its row of every matrix product and its attention.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanochat.errors import UserError
from nanochat.inference.sampling import Sampling, adjust, draw_tokens, probabilities
from nanochat.inference.slots import Backend
from nanochat.inference.speculative import Statistics, common

PIECE = 256
"""tokens of a prompt that are read in one pass, so that others do not wait for the whole"""
DESCRIBED = 32
"""rows of logits whose likelihoods are computed at once, in float64"""
TRIAL = 16
"""passes with drafts after which a request goes on with them only if they pay"""
LEAST_REUSE = 32
"""shortest common beginning of two prompts that is not read again"""


@dataclass(frozen=True)
class Token:
    """A token and how likely the model (before temperature, penalties and biases) thought it."""

    id: int
    logprob: float | None = None
    """natural logarithm; None where it was not asked for"""
    top: tuple[tuple[int, float], ...] = ()
    """the most likely tokens at this place"""


def _keep_going(_: Token) -> bool:
    return False


def _ignore(*_: object) -> None:
    return None


@dataclass(eq=False)
class Request:
    """A prompt to continue. The functions are called from the thread that steps the scheduler."""

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()
    """tokens that end the answer; they are not delivered"""
    logprobs: int | None = None
    """most likely tokens to report at each place; 0 reports the drawn token's likelihood alone"""
    score_prompt: bool = False
    """report the prompt's tokens, too, each with its likelihood"""
    slide: bool = False
    """when the context is full go on from its last half, instead of ending"""
    on_token: Callable[[Token], bool] = _keep_going
    """gets each token; True ends the answer with the reason `stop`"""
    on_prompt: Callable[[list[Token]], None] = _ignore
    """gets the scored prompt"""
    on_end: Callable[[str, str | None], None] = _ignore
    """gets the reason (stop, length, cancelled, error) and a message with `error`"""
    cancelled: bool = False
    submitted: float = 0.0
    started: float = 0.0
    reused: int = 0
    """tokens of the prompt that did not have to be read"""


class _Running:
    """A request in a slot."""

    def __init__(self, request: Request, slot: int, reuse: int, context: int, turn: int) -> None:
        self.request, self.slot = request, slot
        self.turn = turn  # step in which it was admitted, or a piece of it was read last
        self.tokens = list(request.prompt[-context:] if request.slide else request.prompt)
        self.fed = reuse  # tokens that the slot holds
        self.reading = True  # the prompt, or what stays after sliding
        self.written = 0
        self.drafting = Statistics()
        self.generator = torch.Generator().manual_seed(request.seed % 2**63)
        self.counts: Counter[int] = Counter()
        self.prompt_tokens: list[Token] = []
        self.last: Tensor | None = None  # logits (V,) after the last token that was read for scoring


@dataclass
class _Pass:
    """What a pass of the network gave for one request."""

    item: _Running
    logits: Tensor
    """(1 + drafts, V): after the last token, and after each draft"""
    drafts: Sequence[int] = ()


class Scheduler:
    """Serves requests with one backend, step by step; the backend's slots bound the requests under way.

    A request that is alone gets drafts where the backend has them; what it gets does not depend on that.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.waiting: deque[Request] = deque()
        self.running: list[_Running] = []
        self.held: list[list[int]] = [[] for _ in range(backend.slots)]
        """tokens whose keys and values each free slot still holds"""
        self.used = [0] * backend.slots
        self.steps = 0
        self.drafting = Statistics()

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.waiting or self.running)

    def check(self, request: Request) -> None:
        """Raises `UserError` for a prompt of no tokens, one that leaves no room in the context, or unknown tokens."""
        limit = self.backend.context
        if not request.prompt:
            raise UserError("a prompt of no tokens cannot be continued: the tokenizer has no document separator.")
        if len(request.prompt) > limit and not request.slide:
            raise UserError(f"the prompt has {len(request.prompt)} tokens, and the context is {limit}.")
        if min(request.prompt) < 0 or max(request.prompt) >= self.backend.vocab_size:
            raise UserError(f"token ids must be from 0 to {self.backend.vocab_size - 1}.")
        if any(token >= self.backend.vocab_size for token, _ in request.sampling.logit_bias):
            raise UserError(f"logit_bias: token ids must be from 0 to {self.backend.vocab_size - 1}.")

    def submit(self, request: Request) -> None:
        """Put a request into the queue, from any thread; raises what `check` raises."""
        self.check(request)
        request.submitted = time.monotonic()
        self.waiting.append(request)

    def step(self) -> None:
        """Admit, read, write one token each, deliver; an error of the backend ends the requests under way."""
        self.steps += 1
        for item in [item for item in self.running if item.request.cancelled]:
            self._end(item, "cancelled")
        for request in [request for request in list(self.waiting) if request.cancelled]:
            self.waiting.remove(request)
            request.on_end("cancelled", None)
        self._admit()
        try:
            passes = self._read()
            passes += self._decode([item for item in self.running if not item.reading])
        except Exception as error:
            for item in list(self.running):
                item.fed = 0  # what its slot holds is not known
                self._end(item, "error", str(error))
            if not isinstance(error, UserError | RuntimeError | MemoryError):
                raise
            return
        self._write(passes)

    def _admit(self) -> None:
        taken = {item.slot for item in self.running}
        while self.waiting and len(taken) < self.backend.slots:
            request = self.waiting.popleft()
            free = [slot for slot in range(self.backend.slots) if slot not in taken]
            shared = {slot: 0 if request.score_prompt else common(self.held[slot], request.prompt) for slot in free}
            slot = max(free, key=lambda slot: (shared[slot], -self.used[slot]))
            # the last token is read in any case, for its logits
            reuse = min(shared[slot], len(request.prompt) - 1)
            if reuse < LEAST_REUSE or len(request.prompt) > self.backend.context:
                reuse = 0
            if not self.backend.truncate(slot, reuse):
                reuse = 0
            request.started, request.reused = time.monotonic(), reuse
            taken.add(slot)
            self.running.append(_Running(request, slot, reuse, self.backend.context, self.steps))
            self.used[slot] = self.steps

    def _read(self) -> list[_Pass]:
        """The next pieces of prompts; returns those that are read whole.

        Prompts take turns, so that a short one does not wait for the whole of a long one.
        """
        whole: list[_Pass] = []
        read = 0
        for item in sorted((item for item in self.running if item.reading), key=lambda item: item.turn):
            if read >= PIECE:
                break
            item.turn = self.steps
            piece = item.tokens[item.fed : item.fed + PIECE]
            score = item.request.score_prompt and item.written == 0
            logits = self.backend.prefill(item.slot, item.fed, piece, score)
            if score:
                self._score(item, piece, logits)
            item.fed += len(piece)
            read += len(piece)
            if item.fed == len(item.tokens):
                item.reading = False
                if score:
                    item.request.on_prompt(item.prompt_tokens)
                whole.append(_Pass(item, logits[-1:]))
        return whole

    def _score(self, item: _Running, piece: Sequence[int], logits: Tensor) -> None:
        """Likelihoods of a piece of the prompt; logits: (T, V) after each of its tokens."""
        if item.last is None:
            item.prompt_tokens.append(Token(piece[0]))
            before, tokens = logits[:-1], piece[1:]
        else:
            before, tokens = torch.cat([item.last[None], logits[:-1]]), piece
        item.prompt_tokens += describe(before, tokens, item.request.logprobs or 0)
        item.last = logits[-1]

    def _decode(self, items: list[_Running]) -> list[_Pass]:
        # those whose prompt was read whole in this step have logits already
        items = [item for item in items if item.fed < len(item.tokens)]
        for item in [item for item in items if item.fed >= self.backend.context]:
            items.remove(item)
            if item.request.slide:
                item.tokens = item.tokens[-max(1, self.backend.context // 2) :]
                item.fed, item.reading = 0, True
                self.backend.truncate(item.slot, 0)
            else:
                self._end(item, "length")
        if not items:
            return []
        drafts = self._draft(items[0]) if len(self.running) == 1 else []
        fed = [(item.slot, item.fed, item.tokens[-1]) for item in items]
        fed += [(items[0].slot, items[0].fed + 1 + index, draft) for index, draft in enumerate(drafts)]
        slots, starts, tokens = map(list, zip(*fed, strict=True))
        logits = self.backend.decode(slots, starts, tokens)
        for item in items:
            item.fed += 1
        return [
            _Pass(item, logits if drafts else logits[index : index + 1], drafts) for index, item in enumerate(items)
        ]

    def _draft(self, item: _Running) -> list[int]:
        """Guesses of an item's next tokens; none where they do not pay, or nothing could be done with them."""
        found = item.drafting
        if found.passes >= TRIAL and found.tokens < found.passes * self.backend.draft_cost:
            return []
        left = item.request.max_tokens - item.written - 1
        room = min(self.backend.drafts, left, self.backend.context - item.fed - 1)
        return self.backend.draft(item.slot, item.tokens, room) if room > 0 else []

    def _write(self, passes: list[_Pass]) -> None:
        """Draw a token for each pass and deliver it, and further ones as long as the drafts are what is drawn."""
        place = 0
        while passes:
            written = self._write_row([(one.item, one.logits[place]) for one in passes])
            going = []
            for one in passes:
                token, drafted = written.get(one.item), place < len(one.drafts)
                right = token is not None and drafted and token == one.drafts[place]
                for statistics in (one.item.drafting, self.drafting) if one.drafts else ():
                    statistics.passes += place == 0
                    statistics.tokens += token is not None
                    statistics.drafted += drafted
                    statistics.accepted += right
                if right and one.item in self.running:
                    one.item.fed += 1  # the draft was read in the same pass
                    going.append(one)
                elif drafted:
                    self.backend.truncate(one.item.slot, one.item.fed)
            passes, place = going, place + 1

    def _write_row(self, rows: list[tuple[_Running, Tensor]]) -> dict[_Running, int]:
        """Draw a token for each row (V,) and deliver it; returns those that were delivered."""
        ready, written = [], {}
        for item, logits in rows:
            if item.request.max_tokens <= 0:
                self._end(item, "length")
            elif not bool(torch.isfinite(logits.sum())):  # one that is not finite shows in the sum
                self._end(
                    item, "error", "the model's logits are not finite: this checkpoint is of a run that diverged."
                )
            else:
                ready.append((item, logits))
        for (item, logits), token in zip(ready, draw_rows(ready), strict=True):
            request = item.request
            if token in request.stop_ids:
                self._end(item, "stop")
                continue
            written[item] = token
            item.tokens.append(token)
            item.counts[token] += 1
            item.written += 1
            found = Token(token)
            if request.logprobs is not None:
                (found,) = describe(logits[None], [token], request.logprobs)
            if request.on_token(found):
                self._end(item, "stop")
            elif item.written >= request.max_tokens:
                self._end(item, "length")
        return written

    def _end(self, item: _Running, reason: str, message: str | None = None) -> None:
        self.running.remove(item)
        self.held[item.slot] = item.tokens[: item.fed]
        item.request.on_end(reason, message)

    def run(self) -> None:
        """Step until nothing is left to do."""
        while self.busy:
            self.step()


def draw_rows(rows: Sequence[tuple[_Running, Tensor]]) -> list[int]:
    """A token for each row's logits (V,), by its request's sampling; rows that sample alike are drawn together."""
    groups: dict[tuple, list[int]] = {}
    logits: list[Tensor] = []
    for index, (item, row) in enumerate(rows):
        sampling = item.request.sampling
        if sampling.adjusts:
            row = adjust(row, sampling, list({*item.request.prompt, *item.counts}), item.counts)
        logits.append(row)
        groups.setdefault(sampling.shape, []).append(index)
    tokens = [0] * len(rows)
    for (temperature, top_k, top_p, min_p), members in groups.items():
        together = torch.stack([logits[index] for index in members])  # (B, V)
        if temperature == 0:
            drawn = together.argmax(-1)
        else:
            distribution = probabilities(together, Sampling(temperature, top_k, top_p, min_p))
            drawn = draw_tokens(distribution, [rows[index][0].generator for index in members])
        for index, token in zip(members, drawn.tolist(), strict=True):
            tokens[index] = token
    return tokens


def describe(logits: Tensor, tokens: Sequence[int], top: int) -> list[Token]:
    """Tokens, each with its log-likelihood under its row of logits (T, V), and those of the `top` most likely ones."""
    found: list[Token] = []
    for start in range(0, len(tokens), DESCRIBED):
        logprobs = logits[start : start + DESCRIBED].double().log_softmax(-1)
        ids = torch.tensor(tokens[start : start + DESCRIBED], device=logits.device)
        own = logprobs.gather(-1, ids[:, None])[:, 0].tolist()
        values, order = logprobs.topk(min(top, logprobs.shape[-1]))
        rows = zip(order.tolist(), values.tolist(), strict=True)
        found += [
            Token(token, value, tuple(zip(*row, strict=True)))
            for token, value, row in zip(ids.tolist(), own, rows, strict=True)
        ]
    return found
