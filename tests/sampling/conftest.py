"""What the tests of graphs share."""

import pytest
import torch

import fastdiff as fd
from tests.sampling.foreign import ForeignUNet
from tests.sampling.recorder import FakeRecorder


@pytest.fixture
def den():
    torch.manual_seed(0)
    return fd.Denoiser(ForeignUNet().eval(), fd.linear(), "eps", null=lambda c: torch.full_like(c, 10))


@pytest.fixture
def run():
    FakeRecorder.forget()
    return fd.graph(recorder=FakeRecorder)
