"""One place decides the device, the precision and the arithmetic of everything that says `auto`."""

import pytest
import torch

from nanochat import device
from nanochat.device import default_precision, find_device, has_int8_products, matmul_dtype
from nanochat.inference.options import pick_device
from nanochat.run import settle

F32, BF16, INT8 = torch.float32, torch.bfloat16, torch.int8
ZEN_5 = {"avx2": True, "avx512_bf16": True, "avx512_vnni": True}
ZEN_3 = {"avx2": True, "avx512_bf16": False, "avx512_vnni": False}


@pytest.fixture(autouse=True)
def forget_probes():
    """Each test probes its own machine, and leaves no answer of it to the next."""
    yield
    device._bf16_pays.cache_clear()
    device._int8_pays.cache_clear()


@pytest.fixture
def machine(monkeypatch):
    """Make this a machine with the given devices, CPU capabilities, and seconds of a product by dtype."""

    def make(cuda=None, mps=False, flags=ZEN_3, seconds=None):
        def product_seconds(dtype, name="cpu"):
            if seconds is None:
                raise RuntimeError(f"{dtype} was probed")
            return seconds[dtype]

        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(device, "capabilities", lambda: flags)
        monkeypatch.setattr(device, "product_seconds", product_seconds)
        device._bf16_pays.cache_clear()
        device._int8_pays.cache_clear()

    return make


@pytest.mark.parametrize(
    ("cuda", "mps", "name", "precision"),
    [
        ((9, 0), True, "cuda", "bf16-mixed"),
        ((7, 5), False, "cuda", "32-true"),  # bf16 is emulated there
        (None, True, "mps", "32-true"),  # the probe fails, as on an old macOS
        (None, False, "cpu", "32-true"),
    ],
)
def test_auto(machine, cuda, mps, name, precision):
    machine(cuda, mps)
    assert find_device().type == name
    assert default_precision(find_device()) == precision
    trainer = {"accelerator": "auto", "precision": "auto", "max_steps": 5}
    settled = settle({"trainer": trainer, "compile": "auto", "schedule": {}})
    assert settled["trainer"] == {"accelerator": name, "precision": precision, "max_steps": 5}
    assert settled["compile"] is (cuda is not None)


@pytest.mark.parametrize(
    ("flags", "seconds", "dtype", "int8"),
    [
        (ZEN_5, {F32: 4.0, BF16: 1.0, INT8: 0.5}, BF16, True),
        (ZEN_5, {F32: 4.0, BF16: 1.0, INT8: 0.9}, BF16, False),  # int8 units, but not clearly faster than bf16
        (ZEN_5, {F32: 1.0, BF16: 0.9, INT8: 0.5}, F32, True),
        (ZEN_3, None, F32, False),  # no units: nothing is probed
        ({}, {F32: 1.0, BF16: 9.0, INT8: 9.0}, F32, False),  # flags unknown: the probe decides
    ],
)
def test_a_cpu_takes_what_it_multiplies_fast(machine, flags, seconds, dtype, int8):
    machine(flags=flags, seconds=seconds)
    cpu = torch.device("cpu")
    assert matmul_dtype(cpu) == dtype
    assert has_int8_products(cpu) is int8
    assert default_precision(cpu) == ("bf16-mixed" if dtype == BF16 else "32-true")


def test_mps_takes_bf16_where_it_multiplies(machine):
    machine(mps=True, seconds={BF16: 1.0})
    assert default_precision(torch.device("mps")) == "bf16-mixed"


def test_this_machine_answers():
    """The real probes: finite speeds, and an answer for which flags and speeds agree."""
    cpu = torch.device("cpu")
    speeds = device.product_speeds(cpu)
    assert all(0.1 < speed < 1e5 for speed in speeds.values())
    assert matmul_dtype(cpu) in (F32, BF16)
    if not device.has_units(device.BF16_UNITS):
        assert matmul_dtype(cpu) == F32
    assert 2**16 <= device.l2_cache_bytes() <= 2**30


def test_what_is_said_stays():
    trainer = {"accelerator": "cpu", "precision": "bf16-mixed", "max_steps": 5}
    said = {"trainer": trainer, "compile": True, "schedule": {}}
    assert settle(said) == said


def test_lightning_s_gpu_is_not_cuda_everywhere(machine):
    machine(mps=True)
    settled = settle({"trainer": {"accelerator": "gpu", "precision": "auto"}, "compile": "auto"})
    assert settled["trainer"]["precision"] == "32-true"
    assert settled["compile"] is False


def test_generate_takes_the_same(machine):
    machine()
    assert pick_device("auto") == find_device()
