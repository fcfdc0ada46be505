from pathlib import Path

import pytest
from lightning_fabric.plugins import MixedPrecision, Precision
from standin import make_config

from pynar.training import devices


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
