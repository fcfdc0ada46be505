from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from pynar import _backend


@pytest.fixture
def extension() -> Iterator[Any]:
    """The extension, whose SIMD level a test may change."""
    module = _backend.extension()
    if module is None:
        pytest.skip(_backend.why_not_extension())
    level = module.simd_level()
    yield module
    module.set_simd_level(level)


@pytest.fixture(params=["generic", "neon", "avx2", "avx512", "avx512_vnni"])
def simd_level(request: pytest.FixtureRequest, extension: Any) -> str:
    """Each SIMD level in turn, set."""
    if request.param not in extension.simd_levels():
        pytest.skip(f"{request.param} cannot run here")
    extension.set_simd_level(request.param)
    return request.param
