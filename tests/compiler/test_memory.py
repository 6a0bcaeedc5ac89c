"""Memory of compiled models: which tensors they keep alive, and which they release."""

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import qcompiler
from qcompiler import knobs
from qcompiler.ir import Graph
from qcompiler.pass_manager.instruments import Instrument, Outcome
from qcompiler.pass_manager.pipeline import Pass

WIDTH, DEPTH = 256, 4
MATRIX = 4 * WIDTH * WIDTH


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


@pytest.fixture
def _only_new_objects() -> Iterator[None]:
    """Hides existing objects from the garbage collector: searching what earlier tests left takes seconds."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def living_bytes() -> int:
    """Bytes of all reachable tensors that the garbage collector tracks; shared storage counts once."""
    gc.collect()
    # By type: `isinstance` reads `__class__`, for which some deprecated proxies warn.
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter) and not thing.is_meta]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


@pytest.mark.parametrize("lazy", [False, True])
def test_the_model_and_its_float_weights_are_released(lazy: bool) -> None:
    model, x = Tower().eval(), torch.randn(3, WIDTH)
    weights = list(model.parameters())
    watched = [
        weakref.ref(thing) for thing in (model, *weights, *(tensor.untyped_storage() for tensor in weights[::2]))
    ]
    del weights
    fast = qcompiler.compile(model) if lazy else qcompiler.compile(model, example_inputs=(x,))
    fast(x)
    del model
    gc.collect()
    assert not [reference() for reference in watched if reference() is not None]
    assert fast(x).shape == (3, WIDTH)


def test_stages_hold_no_weights() -> None:
    fast = qcompiler.compile(Tower().eval(), example_inputs=(torch.randn(3, WIDTH),))
    assert not any(graph.weights for graph in fast.stages.values())
    held = {tensor.untyped_storage().data_ptr() for tensor in fast.graph.weights.values()}
    assert held == {tensor.untyped_storage().data_ptr() for tensor in fast.buffers()}
    assert sum(tensor.nbytes for tensor in fast.buffers()) < 0.3 * DEPTH * MATRIX


@pytest.mark.usefixtures("_only_new_objects")
def test_without_other_owners_weights_are_released_one_by_one() -> None:
    class Watch(Instrument):
        def __init__(self) -> None:
            self.bytes: dict[str, int] = {}

        def after(self, step: Pass, graph: Graph, outcome: Outcome) -> None:
            if step.name in ("fuse-linear", "fold-constants"):
                self.bytes[step.name] = living_bytes() - before

    watch, x = Watch(), torch.randn(3, WIDTH)
    before = living_bytes()
    fast = qcompiler.compile(Tower().eval(), instruments=[watch])
    with knobs.scope(cpu_cache=0):
        fast(x)
    assert watch.bytes["fuse-linear"] >= DEPTH * MATRIX
    assert watch.bytes["fold-constants"] < 0.3 * DEPTH * MATRIX, "the float weights are gone before compile ends"
    assert living_bytes() - before < 0.3 * DEPTH * MATRIX
    assert fast.source


def test_a_model_that_the_user_keeps_is_untouched() -> None:
    model, x = Tower().eval(), torch.randn(3, WIDTH)
    state = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    qcompiler.compile(model)(x)
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is state[name][0] and torch.equal(tensor, state[name][1])
    assert all(tensor.requires_grad for tensor in model.parameters())


def test_failed_compilation_keeps_no_model() -> None:
    model = Tower().eval()
    watched = weakref.ref(model)
    with pytest.raises(qcompiler.PassError):
        qcompiler.compile(model, pipeline="canonicalize", example_inputs=(torch.randn(3, WIDTH),))
    del model
    gc.collect()
    assert watched() is None
