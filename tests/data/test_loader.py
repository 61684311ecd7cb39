"""The prefetch thread: the right batches, its errors in the consumer, and no thread left behind."""

import gc
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from nanochat.data.loader import PrefetchLoader
from nanochat.errors import UserError


class Counted:
    """Batch i is full of i."""

    def __init__(self, seconds: float = 0.0, fails_at: int | None = None) -> None:
        self.seconds, self.fails_at, self.made = seconds, fails_at, 0

    def batch(self, index: int) -> dict[str, torch.Tensor]:
        if index == self.fails_at:
            raise UserError(f"no batch {index}")
        time.sleep(self.seconds)
        self.made += 1
        tokens = torch.full((2, 3), index)
        return {"tokens": tokens, "targets": tokens}


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "nanochat-prefetch"]


def numbers(iterator, count: int) -> list[int]:
    return [int(next(iterator)["tokens"][0, 0]) for _ in range(count)]


def test_batches_come_in_order_from_the_start():
    loader = PrefetchLoader(Counted(), lambda: 7)
    iterator = iter(loader)
    assert numbers(iterator, 20) == list(range(7, 27))
    assert numbers(iter(loader), 3) == [7, 8, 9]
    assert numbers(iterator, 3) == [27, 28, 29]
    iterator.close()


def test_the_start_is_asked_for_when_the_first_batch_is():
    position = [0]
    iterator = iter(PrefetchLoader(Counted(), lambda: position[0]))
    position[0] = 5
    assert numbers(iterator, 2) == [5, 6]


def test_no_more_than_depth_batches_wait():
    batches = Counted()
    iterator = iter(PrefetchLoader(batches, depth=3))
    next(iterator)
    deadline = time.monotonic() + 5
    while batches.made < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert batches.made == 4  # one used, three waiting
    iterator.close()


def test_an_iterator_that_is_never_used_has_no_thread():
    before = len(threads())
    iterators = [iter(PrefetchLoader(Counted())) for _ in range(3)]
    assert len(threads()) == before
    del iterators


@pytest.mark.parametrize("how", ["close", "drop", "error"])
def test_no_thread_is_left(how):
    gc.collect()
    before = len(threads())
    iterator = iter(PrefetchLoader(Counted(fails_at=2 if how == "error" else None)))
    next(iterator)
    if how == "close":
        assert len(threads()) == before + 1
        iterator.close()
        iterator.close()
    elif how == "drop":
        assert len(threads()) == before + 1
        del iterator
        gc.collect()
    else:
        with pytest.raises(UserError):
            numbers(iterator, 5)
    assert len(threads()) == before


def test_errors_reach_the_consumer_after_the_batches_before_them():
    iterator = iter(PrefetchLoader(Counted(fails_at=3)))
    assert numbers(iterator, 3) == [0, 1, 2]
    for _ in range(2):  # and again, not a wait without end
        with pytest.raises(UserError, match="no batch 3"):
            next(iterator)


def test_waiting_is_measured():
    slow = PrefetchLoader(Counted(seconds=0.02))
    iterator = iter(slow)
    numbers(iterator, 5)
    assert slow.wait_seconds > 0.06
    iterator.close()
    quick = PrefetchLoader(Counted())
    iterator = iter(quick)
    for _ in range(5):
        time.sleep(0.02)  # the work of the network, in which the next batch is made
        next(iterator)
    assert quick.wait_seconds < 0.05
    iterator.close()


def test_a_loader_has_no_state():
    assert not hasattr(PrefetchLoader(Counted()), "state_dict")
    assert not hasattr(PrefetchLoader(Counted()), "__len__")


def test_a_fork_goes_on_by_itself():
    iterator = iter(PrefetchLoader(Counted(), depth=2))
    assert numbers(iterator, 3) == [0, 1, 2]
    read, write = os.pipe()
    with iterator._free._cond:  # as if the thread were just using it: in the fork it stays locked for ever
        child = os.fork()
    if child == 0:
        iterator._free._cond.acquire()
        os.write(write, repr(numbers(iterator, 6)).encode())
        iterator.close()
        os._exit(0)
    os.close(write)
    deadline = time.monotonic() + 20
    while (status := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            pytest.fail("the fork hangs")
        time.sleep(0.01)
    assert status[1] == 0
    assert os.read(read, 100) == b"[3, 4, 5, 6, 7, 8]"
    os.close(read)
    assert numbers(iterator, 3) == [3, 4, 5]
    iterator.close()


def test_the_interpreter_ends_with_a_thread_at_work():
    code = (
        "from tests.data.test_loader import Counted; from nanochat.data.loader import PrefetchLoader\n"
        "iterator = iter(PrefetchLoader(Counted(0.01), depth=2)); next(iterator)\n"
        "print('ok', flush=True)\nraise SystemExit(3)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout == "ok\n"
    assert result.returncode == 3
    assert "Fatal Python error" not in result.stderr
