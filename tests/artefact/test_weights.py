"""Weights of artefacts: every element type and layout, shared and tied ones, state, and several files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import qcompiler
from qcompiler import ArtefactError, CompiledModel
from qcompiler.artefact.checking import check
from qcompiler.ir import Graph


def again(compiled: CompiledModel, folder: Path) -> CompiledModel:
    """Saved, looked at, and loaded."""
    compiled.save(folder / "model")
    found = check(folder / "model")
    assert found.ok, found
    loaded: CompiledModel = qcompiler.load(folder / "model", verify=True)
    return loaded


def same(got: Any, want: Any) -> None:
    """Equal bits, NaN included."""
    if isinstance(want, tuple):
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            same(one, other)
        return
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert torch.equal(got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8))


class Cache(nn.Module):
    """Writes rows to a cache, and says where it is."""

    keys: Tensor
    at: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.register_buffer("keys", torch.zeros(4, 64))
        self.register_buffer("at", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.keys.copy_(torch.cat([self.keys[1:], self.linear(x)]))
        self.at.add_(1)
        return self.keys.sum(0) * self.at


def test_state_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    fast = qcompiler.compile(Cache().eval(), example_inputs=(torch.randn(1, 64),))
    steps = torch.randn(3, 1, 64)
    fast(steps[0])
    loaded = again(fast, tmp_path)
    for step in steps[1:]:
        same(loaded(step), fast(step))
    assert check(tmp_path / "model").ok, "calls change the model's own memory, not the files"
    fresh = qcompiler.load(tmp_path / "model")
    assert int(fresh.graph.weights["at"]) == 1 and int(loaded.graph.weights["at"]) == 3


class Layouts(nn.Module):
    """Weights as they come: transposed, in channels_last, parts of others, repeated, empty, scalar, shared, tied."""

    def __init__(self) -> None:
        super().__init__()
        base = torch.randn(96, 130)
        self.turned = nn.Parameter(torch.randn(64, 48).t())
        self.conv = nn.Conv2d(3, 16, 1)
        self.conv.weight.data = self.conv.weight.data.contiguous(memory_format=torch.channels_last)
        self.part, self.other = nn.Parameter(base[:, :64]), nn.Parameter(base[2:50:2])
        self.repeated = nn.Parameter(torch.randn(1, 16).expand(5, 16))
        self.empty = nn.Parameter(torch.zeros(0, 16, dtype=torch.bfloat16))
        self.scalar = nn.Parameter(torch.tensor(2.5))
        self.linear, self.tied = nn.Linear(16, 16), nn.Linear(16, 16)
        self.tied.weight = self.linear.weight
        self.odd = nn.Parameter(torch.randn(7))

    def forward(self, image: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        y, some = self.tied(self.linear(x)) * self.scalar + self.repeated, x.sum()
        rest = (self.turned * some, self.part * some, self.other * some, self.odd + some)
        return self.conv(image), torch.cat([y, self.empty]), *rest


def test_weights_of_all_layouts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    call = (torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last), torch.randn(5, 16))
    fast = qcompiler.compile(Layouts().eval(), example_inputs=call, scheme="fp8_row")
    loaded = again(fast, tmp_path)
    same(loaded(*call), fast(*call))
    for name in ("turned", "conv.weight", "scalar", "odd"):
        mine, theirs = loaded.graph.weights[name], fast.graph.weights[name]
        assert (mine.shape, mine.stride()) == (theirs.shape, theirs.stride()), name
    assert all(tensor.data_ptr() % 64 == 0 for tensor in loaded.graph.weights.values())


def test_a_tied_weight_is_stored_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.inner, self.head = nn.Embedding(50, 32), nn.Linear(32, 32), nn.Linear(32, 50, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.inner(self.table(ids))) + self.table.weight.sum()  # type: ignore[no-any-return]

    ids = torch.randint(0, 50, (2, 5))
    fast = qcompiler.compile(Tied().eval(), example_inputs=(ids,))
    loaded = again(fast, tmp_path)
    same(loaded(ids), fast(ids))
    stored = load_file(tmp_path / "model" / "weights.safetensors")
    assert sum(tensor.shape == (50, 32) for tensor in stored.values()) == 1


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.float8_e8m0fnu, torch.complex64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
        torch.uint16, torch.uint32, torch.uint64, torch.bool,
    ],
)  # fmt: skip
def test_every_element_type(tmp_path: Path, dtype: torch.dtype) -> None:
    """With all bit patterns that it has, NaN and negative zero among them."""
    patterns = torch.arange(256, dtype=torch.uint8).repeat(16).view(dtype)
    values = patterns if dtype is not torch.bool else torch.arange(64) % 2 == 0
    kind = str(qcompiler.TensorType.of(values))
    graph = Graph.parse(
        f"""func @main(%x: f32[2]) -> (f32[2], {kind}) {{
          %w = core.param() {{name = "w"}} : {kind}
          %v = core.param() {{name = "v"}} : f32[2]
          %y = aten.add.Tensor(%x, %v) : f32[2]
          %z = aten.view_as(%w, %w) : {kind}
          return %y, %z
        }}"""
    )
    graph.weights = {"w": values, "v": torch.ones(2)}
    fast = qcompiler.compile(graph, pipeline="", strict=False)
    loaded = again(fast, tmp_path)
    same(loaded.graph.weights["w"], values)
    same(loaded(torch.zeros(2)), fast(torch.zeros(2)))


def test_shards(tmp_path: Path) -> None:
    layers, x = nn.Sequential(nn.Linear(200, 136), nn.ReLU(), nn.Linear(136, 64)).eval(), torch.randn(3, 200)
    fast = qcompiler.compile(layers, example_inputs=(x,))
    fast.save(tmp_path / "model", shard_bytes=10_000)
    names = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(names) > 1 and names[0] == f"weights-00001-of-{len(names):05d}.safetensors"
    stored = [load_file(tmp_path / "model" / name) for name in names]
    assert all(sum(t.nbytes for t in part.values()) <= 10_000 or len(part) == 1 for part in stored)
    assert {name for part in stored for name in part} == set(fast.graph.weights)
    same(qcompiler.load(tmp_path / "model", verify=True)(x), fast(x))
    (tmp_path / "model" / names[1]).unlink()
    with pytest.raises(ArtefactError, match=f"is missing: got No such file or directory .*{names[1]}"):
        qcompiler.load(tmp_path / "model")
