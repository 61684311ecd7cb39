"""A model's own thread: it steps the scheduler while there is something to do, and other threads hand requests in."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from nanochat.inference.scheduler import Request, Scheduler
from nanochat.serve.models import Model

log = logging.getLogger("nanochat.serve")


class Full(Exception):
    """The queue has no room; try again later."""


class Engine:
    """Runs one model.

    max_waiting: requests that may wait for a slot.
    """

    def __init__(self, model: Model, max_waiting: int = 256) -> None:
        self.model, self.max_waiting = model, max_waiting
        self.scheduler = Scheduler(model.backend)
        self._jobs: deque[tuple[Callable[[], Any], Future]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"engine {model.name}", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self.scheduler.waiting)

    @property
    def running(self) -> int:
        """Requests with a slot."""
        return len(self.scheduler.running)

    def submit(self, requests: list[Request]) -> None:
        """Queue requests, all of them or none.

        Raises `Full`, or `UserError` for a prompt that cannot be continued.
        """
        for request in requests:
            self.scheduler.check(request)
        with self._wake:
            free = self.model.backend.slots - self.running
            if self._stopping or self.waiting + len(requests) > self.max_waiting + max(free, 0):
                raise Full
            for request in requests:
                self.scheduler.submit(request)
            self._wake.notify()

    def cancel(self, request: Request) -> None:
        """End a request before its next token; its slot is free then."""
        request.cancelled = True

    def call(self, function: Callable[[], Any]) -> Future:
        """Run a function in the model's thread, between two steps."""
        future: Future = Future()
        with self._wake:
            if self._stopping or len(self._jobs) >= self.max_waiting:
                raise Full
            self._jobs.append((function, future))
            self._wake.notify()
        return future

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self.scheduler.busy or self._jobs or self._stopping):
                    self._wake.wait()
                if self._stopping and not self.scheduler.busy and not self._jobs:
                    return
                job = self._jobs.popleft() if self._jobs else None
            if job is not None:
                _finish(*job)
            try:
                self.scheduler.step()
            except Exception:  # the step has ended its requests; the next ones shall be served
                log.exception("a step of %s failed", self.model.name)

    def close(self, deadline: float = 0.0) -> None:
        """Take no more requests, give those under way `deadline` seconds, cancel the rest, and free the model."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(max(deadline, 0.01))
        if self._thread.is_alive():
            for request in [*self.scheduler.waiting, *(item.request for item in list(self.scheduler.running))]:
                request.cancelled = True
            self._thread.join(10.0)
        if not self._thread.is_alive():
            self.model.backend.close()


def _finish(function: Callable[[], Any], future: Future) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)
