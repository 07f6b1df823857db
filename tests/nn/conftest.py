"""What the tests of `fd.patch` share."""

from typing import Any

import pytest
import torch

from fastdiff.nn import group_norm


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry a call of the op: whether with its SiLU."""
    seen: list[bool] = []
    op = group_norm.group_norm_silu

    def spy(*args: Any, act: bool = True, **given: Any) -> torch.Tensor:
        seen.append(act)
        return op(*args, act=act, **given)

    monkeypatch.setattr(group_norm, "group_norm_silu", spy)
    return seen
