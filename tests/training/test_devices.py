import platform
import subprocess
import sys
from pathlib import Path

import pytest
from lightning_fabric.plugins import MixedPrecision, Precision
from standin import make_config

from pynar.training import devices

PROGRAM = """
import torch
from pynar.training.devices import keep_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

{call}
torch.ones(1 << 24)
before = resident()
torch.ones(1 << 25)
print(resident() - before)
"""


@pytest.mark.parametrize(("native", "kind"), [("bf16", MixedPrecision), ("fp32", Precision)])
def test_auto_takes_what_the_device_multiplies(native, kind, monkeypatch, recwarn):
    monkeypatch.setattr(devices, "precision_on", lambda accelerator: native)
    fabric = devices.make_fabric(make_config(precision="auto", device="cpu"))
    assert type(fabric.strategy.precision) is kind
    assert not recwarn.list


def test_emulated_bf16_is_warned_of(monkeypatch):
    monkeypatch.setattr(devices, "precision_on", lambda accelerator: "fp32")
    with pytest.warns(UserWarning, match="bf16.*many times slower"):
        fabric = devices.make_fabric(make_config(precision="bf16", device="cpu"))
    assert isinstance(fabric.strategy.precision, MixedPrecision)


def test_without_products_of_bf16_it_is_fp32():
    flags = (
        set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else set()
    )
    if not flags & {"avx2", "avx512bw"}:
        pytest.skip("no x86 processor that tells its instruction sets")
    assert devices.precision_on("cpu") == ("bf16" if "avx512bw" in flags else "fp32")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_stays_with_the_process():
    grown = []
    for call in ("", "keep_freed_memory()"):
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM.format(call=call)],
            capture_output=True,
            text=True,
            check=True,
        )
        grown.append(int(result.stdout))
    returned, kept = grown
    assert returned < 1 << 20
    assert kept > 1 << 25
