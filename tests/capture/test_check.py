"""The check after capture rejects wrong graphs of deep bf16 models and accepts right graphs on other kernels."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qcompiler.capture import Captured, capture
from qcompiler.capture.comparison import _equal, compare, same_values
from qcompiler.capture.distance import Distance
from qcompiler.capture.double import DoublePrecision, WideTensor, value_of, widened
from qcompiler.capture.examples import Call
from qcompiler.capture.noise import RoundingNoise
from qcompiler.capture.runs import Runs
from qcompiler.errors import CaptureError
from qcompiler.ir import Graph

LAYERS = 4


class Block(nn.Module):
    """Rotary attention and a GELU network, as in LLMs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm_2 = nn.RMSNorm(64, 1e-6), nn.LayerNorm(64)
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        q, k = (t * turn[0] + torch.cat([-t[..., 8:], t[..., :8]], -1) * turn[1] for t in (q, k))
        y = nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.25)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.norm_2(x)
        result: Tensor = x + self.down(nn.functional.gelu(self.up(y), approximate="tanh"))
        return result


class Decoder(nn.Module):
    """A deep decoder: returns logits and the most likely tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(96, 64), nn.RMSNorm(64, 1e-6), nn.Linear(64, 96, bias=False)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.arange(ids.shape[1], device=ids.device)
        angles = places[:, None] * 100.0 ** (-torch.arange(8, device=ids.device) / 8)
        x = self.embed(ids)
        turn = tuple(torch.cat([t, t], -1).to(x.dtype) for t in (angles.cos(), angles.sin()))
        mask = places[:, None] >= places
        for block in self.blocks:
            x = block(x, turn, mask)
        logits: Tensor = self.head(self.norm(x))
        return logits, logits.argmax(-1)


class OtherKernels(TorchDispatchMode):
    """Matmuls that keep partial sums in bf16, like split-K."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ not in ("mm", "addmm", "bmm"):
            return func(*args, **(kwargs or {}))
        left, right = args[-2:]
        total = sum(a @ b for a, b in zip(left.chunk(4, -1), right.chunk(4, -2), strict=True))
        return args[0] + total if len(args) == 3 else total


@contextmanager
def both(*contexts: Any) -> Iterator[None]:
    with contexts[0], contexts[1]:
        yield


class OtherRuns(Runs):
    """Runs the graph on different kernels than the model."""

    def of_graph(self, call: Call, mode: Any = None, enter: Any = torch.clone) -> dict[str, Any]:
        other = OtherKernels()  # type: ignore[no-untyped-call]  # torch's has no types
        return super().of_graph(call, other if mode is None else both(mode, other), enter)


def tokens(seed: int, rows: int = 2) -> Call:
    return (torch.randint(0, 96, (rows, 12), generator=torch.Generator().manual_seed(seed)),), {}


@pytest.fixture(scope="module")
def deep() -> tuple[nn.Module, Captured]:
    torch.manual_seed(0)
    model = Decoder().bfloat16().eval()
    with torch.no_grad():
        model.embed.weight.mul_(0.02)  # like untrained models: small values make the epsilon of the first norm matter
        for name, tensor in model.named_parameters():
            if "norm" in name:
                tensor.normal_(1, 0.2)
    return model, capture(model, *tokens(0), check=False)


def made(runs: type[Runs], deep: tuple[nn.Module, Captured], graph: Graph | None = None) -> Runs:
    model, captured = deep
    return runs(graph or captured.graph, captured.signature, model)


@pytest.mark.parametrize("runs", [Runs, OtherRuns])
def test_a_right_graph_passes_on_any_kernels(deep: tuple[nn.Module, Captured], runs: type[Runs]) -> None:
    model, captured = deep
    for seed in range(3):
        compare(runs(captured.graph, captured.signature, model), tokens(seed))
    sides = made(runs, deep)
    logits = [run(tokens(0))["[0]"] for run in (sides.of_model, sides.of_graph)]
    assert torch.equal(*logits) == (runs is Runs)  # other kernels produce other bits


FAULTS = {
    "epsilon of a norm": (r"1e-06(?=\) .*blocks\.0\.)", "1e-05"),
    "attention scale off by 1%": (r"scale = 0\.25(?=.*blocks\.2\")", "scale = 0.2525"),
    "dropped residual": (r"add\.Tensor\(%\w+, (%linear_9)\)", r"mul.Tensor(\1, 1.0)"),
    "q and k swapped": (r"(attention_2 = .*?\()(%\w+), (%\w+)", r"\1\3, \2"),
    "dropped bias": (r", %blocks\.2\.up\.bias\)", ")"),
    "another layer's gain": (r"\[64\], %blocks\.2\.norm\.weight", "[64], %blocks.1.norm.weight"),
    "erf for tanh": (r"approximate = \"tanh\"(?=.*blocks\.2\")", 'approximate = "none"'),
    "sign of a rotation": (r"neg\((%\w+)\)(?=.*blocks\.2\")", r"mul.Tensor(\1, 1.0)"),
    "base of the rotation": (r"Scalar\(100\.0", "Scalar(101.0"),
    "causal mask off by one": (r"aten\.ge\.Tensor\((%\w+), (%\w+)\)", r"aten.ge.Tensor(\1, %arange_0)"),
    "one wrong element of the mask": (r"(attention_2 = .*), %ge\)", r"\1, %holed)"),
    "all sequences read the first": (r"(embedding\(%embed\.weight), %ids", r"\1, %first"),
}
BEFORE = {
    "causal mask off by one": ("  %ge = ", "  %arange_0 = aten.sub.Tensor(%arange, 1) : i64[s1]\n"),
    "one wrong element of the mask": (
        "  %embedding = ",
        "  %row = aten.eq.Scalar(%unsqueeze, 7) : b8[s1, 1]\n  %column = aten.eq.Scalar(%arange, 3) : b8[s1]\n"
        "  %hole = aten.bitwise_and.Tensor(%row, %column) : b8[s1, s1]\n"
        "  %causal = aten.ge.Tensor(%unsqueeze, %arange) : b8[s1, s1]\n"
        "  %holed = aten.bitwise_xor.Tensor(%causal, %hole) : b8[s1, s1]\n",
    ),
    "all sequences read the first": (
        "  %embedding = ",
        "  %one = aten.slice.Tensor(%ids, 0, 0, 1) : i64[1, s1]\n  %first = aten.expand_as(%one, %ids) : i64[s0, s1]\n",
    ),
}
"""Fault -> lines to insert, and the text that they precede."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_graph_is_refused(deep: tuple[nn.Module, Captured], fault: str) -> None:
    text, count = re.subn(*FAULTS[fault], str(deep[1].graph), count=1)
    assert count == 1
    before, lines = BEFORE.get(fault, ("", ""))
    graph = Graph.parse(text.replace(before, lines + before, 1) if lines else text)
    graph.weights = deep[1].graph.weights
    with pytest.raises(CaptureError, match=r"differs, in FP64 as well: got a largest difference of .*ids\[2, 12\]"):
        compare(made(OtherRuns, deep, graph), tokens(0))


def test_a_graph_that_rounds_more_than_its_model_is_refused() -> None:
    """The outputs agree in FP64; only the graph's rounding error is larger."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    captured = capture(model, (torch.randn(4, 64),), check=False)
    text = str(captured.graph).replace(
        "  %linear_1 = ", "  %low = aten._to_copy(%linear) {dtype = bf16} : bf16[s0, 64]\n"
        "  %high = aten._to_copy(%low) {dtype = f32} : f32[s0, 64]\n  %linear_1 = ",
    ).replace("linear(%linear,", "linear(%high,")  # fmt: skip
    graph = Graph.parse(text)
    graph.weights = captured.graph.weights
    with pytest.raises(
        CaptureError, match=r"the output differs by more than rounding explains: got a largest .* 4 times"
    ):
        compare(Runs(graph, captured.signature, model), ((torch.randn(4, 64),), {}))


class Router(nn.Module):
    """Selects the better of two experts with nearly equal scores: rounding decides, and the output jumps."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.score, self.experts = nn.Linear(64, 64), nn.Linear(64, 2), nn.Linear(64, 128)
        with torch.no_grad():
            self.score.weight[1] = self.score.weight[0] * (1 + 0.005 * torch.randn(64))
            self.score.bias[1] = self.score.bias[0]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.inner(x)
        choice = self.score(x).argmax(-1, keepdim=True)
        left, right = self.experts(x).chunk(2, -1)
        return torch.where(choice == 0, left, right), choice


@pytest.mark.parametrize("runs", [Runs, OtherRuns])
def test_choices_decided_by_rounding_do_not_refuse_a_graph(runs: type[Runs]) -> None:
    torch.manual_seed(0)
    model = Router().bfloat16().eval()
    captured = capture(model, (torch.randn(4, 64).bfloat16(),), check=False)
    jumps = 0
    for seed in range(5):
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
        both_ways = made(runs, (model, captured))
        compare(both_ways, ((x,), {}))
        jumps += int((both_ways.of_model(((x,), {}))["[1]"] != both_ways.of_graph(((x,), {}))["[1]"]).sum())
    assert (jumps > 0) == (runs is OtherRuns)


class Running(nn.Module):
    """Adds to a bf16 buffer in place, and counts."""

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)
        self.register_buffer("total", torch.randn(64))
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        self.total += self.inner(x).sum(0)
        self.count += 1
        return self.total * self.count


def test_state_is_compared_in_fp64_and_restored() -> None:
    model = Running().bfloat16().eval()
    x = torch.randn(4, 64).bfloat16()
    captured = capture(model, (x,), check=False)
    before, buffers = {key: t.clone() for key, t in model.state_dict().items()}, dict(model.named_buffers())
    compare(made(OtherRuns, (model, captured)), ((x,), {}))
    graph = Graph.parse(str(captured.graph).replace("aten.add.Tensor(%count, 1)", "aten.add.Tensor(%count, 2)"))
    graph.weights = captured.graph.weights
    with pytest.raises(CaptureError, match="the output differs, in FP64 as well"):
        compare(made(OtherRuns, (model, captured), graph), ((x,), {}))
    assert all(buffers[key] is buffer for key, buffer in model.named_buffers())
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


# The two modes


def test_fp64_is_invisible_to_the_model_and_exact() -> None:
    torch.manual_seed(0)
    model = Decoder().bfloat16().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (ids,), _ = tokens(0)
    with torch.no_grad():
        with DoublePrecision():
            logits, best = model(ids)
        want = model.double()(ids)[0]
    assert type(logits) is WideTensor and logits.dtype == torch.bfloat16 and best.dtype == torch.int64
    # The FP64 model still rounds the angles, where its code says float32.
    assert float((value_of(logits) - want).norm() / want.norm()) < 1e-6
    assert all(torch.equal(before[name], tensor.bfloat16()) for name, tensor in model.state_dict().items())


def test_fp64_of_operators_with_special_rules() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    wide = x.double()
    with DoublePrecision(), torch.no_grad():
        y = widened(x)
        z = y.float()
        z += 1
        z[0] = 2
        results = [z, y.mean(), torch.ones(2, dtype=torch.int64) / 3, torch.full((2,), 0.1), y.argmax(-1), y[:, :2].t()]
        assert float(y.sum()) == pytest.approx(float(wide.sum()), rel=1e-15) and bool((y[0] == x[0]).all())
    changed = wide + 1
    changed[0] = 2
    third, tenth = torch.full((2,), 1 / 3, dtype=torch.float64), torch.full((2,), 0.1, dtype=torch.float64)
    wanted = [changed, wide.mean(), third, tenth, wide.argmax(-1), wide[:, :2].t()]
    assert [value_of(got).tolist() for got in results] == [want.tolist() for want in wanted]
    assert [got.dtype for got in results] == [
        torch.float32, torch.bfloat16, torch.float32, torch.float32, torch.int64, torch.bfloat16
    ]  # fmt: skip
    with pytest.raises(RuntimeError, match="data pointer"):
        y.data_ptr()


def test_large_weights_are_widened_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompiler.capture.double.CHUNK", 100)
    x, w, bias = torch.randn(3, 16).bfloat16(), torch.randn(16, 40).bfloat16(), torch.randn(40).bfloat16()
    stack, many = torch.randn(5, 16, 8).bfloat16(), torch.randn(5, 2, 16).bfloat16()
    with DoublePrecision():
        got = [widened(x) @ w, torch.addmm(bias, widened(x), w), widened(many) @ stack]
    want = [x.double() @ w.double(), bias + x.double() @ w.double(), many.double() @ stack.double()]
    for found, wanted in zip(got, want, strict=True):
        torch.testing.assert_close(value_of(found), wanted, rtol=1e-14, atol=1e-14)


def test_noise_moves_each_entry_by_at_most_one_unit_in_the_last_place() -> None:
    x, w = torch.randn(8, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    state = torch.get_rng_state()
    plain = x @ w
    moved = []
    for seed in (0, 0, 1):
        with RoundingNoise(seed):
            moved.append(x @ w)
            assert torch.equal(x.t().clone(), x.t()) and torch.equal(torch.cat([x, x])[:8], x)  # without rounding
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(moved[0], moved[1]) and not torch.equal(moved[0], moved[2])
    assert float(((moved[0] - plain).abs() / plain.abs().clamp(min=1e-30)).max()) <= 2 * torch.finfo(torch.bfloat16).eps
    assert float((moved[0] != plain).float().mean()) > 0.3


def test_distances() -> None:
    nan, inf = float("nan"), float("inf")
    assert Distance.between(torch.tensor([1.0, nan, inf, 2.0]), torch.tensor([1.0, nan, inf, 5.0])) == Distance(
        1.5, 3.0
    )
    assert Distance.between(torch.tensor([1.0, nan, inf]), torch.tensor([1.0, 2.0, -inf])) == Distance(0.0, 0.0, 2)
    assert Distance.between(torch.tensor([1, 2, 3]), torch.tensor([1, 5, 4])) == Distance(unlike=2)
    assert str(Distance(unlike=2)) == "2 entries that differ in kind or number"
    assert Distance.of_size(torch.tensor([3.0, -4.0]), 0.5) == Distance(12.5**0.5 / 2, 2.0)
    assert Distance(1, 2).within(Distance(1, 2)) and not Distance(1, 2, 1).within(Distance(1, 2).times(9))


def test_equal_values_are_found_equal_in_fp64() -> None:
    x = torch.randn(64, 64)

    def run(order: Tensor, *how: Any) -> dict[str, Any]:
        mode, enter = how or (torch.no_grad(), torch.clone)
        with mode:
            given = enter(x)
            return {"y": given[:, order] @ given[order]}

    ways = [torch.arange(64), torch.randperm(64)]
    assert not torch.equal(run(ways[0])["y"], run(ways[1])["y"])
    assert same_values(partial(run, ways[0]), partial(run, ways[1]), ["y"])
    assert not same_values(partial(run, ways[0][:63]), partial(run, ways[0]), ["y"])


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
def test_a_deep_model_on_a_gpu_is_captured(seed: int) -> None:
    """Model and graph use different attention kernels: 8 layers differ by some percent of the largest entry."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=2048, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=4, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaModel(config).to("cuda", torch.bfloat16).eval()
    ids = torch.randint(0, 1024, (16, 128), device="cuda")
    captured = capture(model, kwargs={"input_ids": ids})
    wrong = Graph.parse(str(captured.graph).replace("scale = 0.08838834764831845", "scale = 0.0892722311", 1))
    wrong.weights = captured.graph.weights
    assert str(wrong) != str(captured.graph)
    with pytest.raises(CaptureError, match="in FP64 as well"):
        compare(Runs(wrong, captured.signature, model), ((), {"input_ids": ids}))


def test_nan_equals_only_nan() -> None:
    nan = float("nan")
    assert _equal("a number", nan, nan, "") and _equal("a number", 1.5, 1.5, "")
    for got, want in ((1.5, nan), (nan, 1.5), (1.5, 2.5)):
        with pytest.raises(CaptureError, match="a number differs"):
            _equal("a number", got, want, "")
