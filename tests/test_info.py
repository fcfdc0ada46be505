from __future__ import annotations

import pytest

from pynar import _backend, info
from pynar.ops import __all__ as operator_names


def test_every_operator_is_listed_for_every_device() -> None:
    report = info.collect()
    assert set(report.operators) == set(operator_names)
    for devices in report.operators.values():
        assert set(devices) == {"cpu", "cuda"}


def test_it_says_what_runs_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    info.main()
    printed = capsys.readouterr().out
    assert "mask_predict_step" in printed
    if _backend.extension() is None:
        assert _backend.why_not_extension() in printed
        assert "reference: " in printed
    else:
        assert _backend.extension().simd_level() in printed
