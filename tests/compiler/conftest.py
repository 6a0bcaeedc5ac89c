"""Fixtures that several test files of this folder use."""

import pytest
import torch
from models import Mlp

import qcompiler
from qcompiler import CompiledModel


@pytest.fixture
def mlp() -> Mlp:
    torch.manual_seed(0)
    return Mlp().eval()


@pytest.fixture(scope="module")
def fast() -> CompiledModel:
    torch.manual_seed(0)
    return qcompiler.compile(Mlp().eval(), example_inputs=(torch.randn(4, 200),))
