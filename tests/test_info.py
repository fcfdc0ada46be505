from __future__ import annotations

from pathlib import Path

import pytest

from pynar import _backend, info, reference
from pynar.ops import __all__ as operator_names


def test_every_operator_is_listed_for_every_device() -> None:
    report = info.collect()
    operators = {name.removesuffix("_backward") for name in report.operators}
    definitions = {path.stem for path in Path(reference.__path__[0]).glob("[!_]*.py")}
    # head_linear runs as flow_linear; squeeze.py defines both directions, packed_layers.py a step.
    assert operators == definitions - {"head_linear"} | {"unsqueeze", "packed_step"}
    assert definitions | operators <= set(operator_names)
    for devices in report.operators.values():
        assert set(devices) == {"cpu", "cuda"}


def test_what_is_only_for_cpus_says_so() -> None:
    devices = info.collect().operators["packed_linear"]
    assert devices["cuda"] == "none: packed weights are for CPUs"
    assert not devices["cpu"].startswith("none")


def test_it_says_what_runs_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    info.main()
    printed = capsys.readouterr().out
    assert "mask_predict_step" in printed
    if _backend.extension() is None:
        assert _backend.why_not_extension() in printed
        assert "reference: " in printed
    else:
        assert _backend.extension().simd_level() in printed
