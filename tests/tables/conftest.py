from __future__ import annotations

import warnings
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture(scope="session")
def diffusers() -> ModuleType:
    """The peer library; its own import warnings are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("diffusers", reason="parity with diffusers needs `pip install diffusers`")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(1)
