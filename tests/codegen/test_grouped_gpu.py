"""Each configuration of the grouped kernels on a Hopper GPU, against float64 on the same operands."""

import math
from itertools import accumulate

import pytest
import torch
from hopper_kernels import GROUPED_CONFIGS as CONFIGS
from hopper_kernels import TALL, launch_grouped
from torch import Tensor

import codegen.torch_ops  # noqa: F401  (registers the operators)
import qcompiler
from codegen.templates.grouped import GroupedConfig
from codegen.templates.template import ceil_div
from qcompiler.errors import CodegenError

pytestmark = pytest.mark.gpu

E4M3 = torch.float8_e4m3fn
NAN = 0x7F
"""The code of NaN."""
TILES = ([1, 128], [128, 128])
TOLERANCE = {torch.bfloat16: 2.5e-3, torch.float16: 5e-4, torch.float32: 4e-4}
configs = pytest.mark.parametrize("config", CONFIGS, ids=str)
grouped_linear = torch.ops.qcompiler.grouped_linear

COUNTS = {
    "groups of every size around a tile": [5, 0, 130, 1, 0, 64, 300, 17, 63, 65, 127, 129, 191, 193, 16, 15],
    "all tokens in one group": [0, 0, 0, 777, 0],
    "one token": [0, 0, 1],
    "no token": [0, 0, 0],
    "one group": [1000],
    "as many groups as a warp has lanes": [3, 1, 0, 0, 9, 40, 2, 77] * 4,
}


def operands(rows: int, groups: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Distinct codes and scales."""
    generator = torch.Generator("cuda").manual_seed(rows + n + k)

    def codes(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(E4M3)

    def scales(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device="cuda").mul(2).exp()

    columns = scales(ceil_div(k, 128), max(ceil_div(rows, 4), 1) * 4)[:, :rows].T
    return codes(rows, k), columns, codes(groups, n, k), scales(groups, ceil_div(n, 128), ceil_div(k, 128))


def exact(x: Tensor, xs: Tensor, w: Tensor, ws: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    n, k = w.shape[1:]
    left = x.double() * xs.double().repeat_interleave(128, 1)[:, :k]
    want = torch.zeros(len(x), n, dtype=torch.float64, device="cuda")
    for group, (start, end) in enumerate(spans):
        spread = ws[group].double().repeat_interleave(128, 0).repeat_interleave(128, 1)[:n, :k]
        want[start:end] = left[start:end] @ (w[group].double() * spread).T
    return want


def spans_of(counts: list[int]) -> list[tuple[int, int]]:
    ends = list(accumulate(counts))
    return list(zip([0, *ends], ends, strict=False))


def ends_of(counts: list[int]) -> Tensor:
    return torch.tensor(counts, device="cuda").cumsum(0).to(torch.int32)


def assert_close(got: Tensor, want: Tensor) -> None:
    assert float((got.double() - want).norm()) <= TOLERANCE[got.dtype] * float(want.norm())


@configs
@pytest.mark.parametrize("name", COUNTS)
def test_groups_garbage_and_equal_bits(config: GroupedConfig, name: str) -> None:
    counts, tail = COUNTS[name], 33
    rows = sum(counts) + tail
    for n, k, dtype in ((464, 1104, torch.bfloat16), (128, 16, torch.float16), (264, 640, torch.float32)):
        if config is TALL and dtype is torch.float32:
            continue  # its tile does not fit next to the ring buffer
        x, xs, w, ws = operands(rows, len(counts), n, k)
        x.view(torch.uint8)[rows - tail :], xs[rows - tail :] = NAN, math.nan
        out = torch.full((rows + 5, n), math.nan, dtype=dtype, device="cuda")
        out[rows:] = 7.0
        launch_grouped(config, x, w, out[:rows], xs, ws, ends_of(counts))
        assert_close(out[: rows - tail], exact(x, xs, w, ws, spans_of(counts))[: rows - tail])
        assert bool((out[rows - tail : rows] == 0).all()), "rows after the last group are zero"
        assert bool((out[rows:] == 7.0).all()), "wrote beyond the last row"
        again = torch.full_like(out, math.nan)
        for _ in range(10):
            launch_grouped(config, x, w, again[:rows], xs, ws, ends_of(counts))
            assert torch.equal(out[:rows].view(torch.uint8), again[:rows].view(torch.uint8)), "other bits: a race"


@configs
def test_masked_groups_do_not_write_other_rows(config: GroupedConfig) -> None:
    for capacity, counts in ((200, [3, 0, 100, 64, 200, 192]), (7, [7, 1, 0, 5]), (1, [1, 0, 1])):
        x, xs, w, ws = operands(len(counts) * capacity, len(counts), 272, 400)
        unread = torch.ones(len(counts), capacity, dtype=torch.bool)
        for group, count in enumerate(counts):
            unread[group, :count] = False
        garbage = unread.flatten().cuda()
        x.view(torch.uint8)[garbage], xs[garbage] = NAN, math.nan
        out = torch.full((len(counts) * capacity, 272), 7.0, dtype=torch.bfloat16, device="cuda")
        there = torch.tensor(counts, dtype=torch.int32, device="cuda")
        launch_grouped(config, x, w, out, xs, ws, there, capacity)
        spans = [(group * capacity, group * capacity + count) for group, count in enumerate(counts)]
        assert_close(out[~garbage], exact(x, xs, w, ws, spans)[~garbage])
        assert bool((out[garbage] == 7.0).all())


@configs
def test_nan_codes_and_scales_poison_only_their_row(config: GroupedConfig) -> None:
    counts = [5, 0, 130, 1, 64]
    x, xs, w, ws = operands(sum(counts), len(counts), 272, 400)
    clean, out = torch.empty(2, len(x), 272, dtype=torch.bfloat16, device="cuda")
    launch_grouped(config, x, w, clean, xs, ws, ends_of(counts))
    x.view(torch.uint8)[4, 399], xs[100, 3] = NAN, math.nan
    launch_grouped(config, x, w, out, xs, ws, ends_of(counts))
    assert out.isnan().any(1).nonzero().flatten().tolist() == [4, 100] and bool(out[[4, 100]].isnan().all())
    alone = ~out.isnan()
    assert torch.equal(out[alone], clean[alone])


@configs
@pytest.mark.parametrize("groups", [256, 1000])
def test_many_groups(config: GroupedConfig, groups: int) -> None:
    counts = torch.randint(0, 12, (groups,), generator=torch.Generator().manual_seed(groups)).tolist()
    x, xs, w, ws = operands(sum(counts), groups, 144, 272)
    out = torch.full((len(x), 144), math.nan, dtype=torch.bfloat16, device="cuda")
    launch_grouped(config, x, w, out, xs, ws, ends_of(counts))
    assert_close(out, exact(x, xs, w, ws, spans_of(counts)))


def test_offsets_that_decrease_or_exceed_the_tensor_are_harmless() -> None:
    x, xs, w, ws = operands(100, 4, 128, 256)
    for config in CONFIGS:
        out = torch.full((100, 128), math.nan, dtype=torch.bfloat16, device="cuda")
        wrong = torch.tensor([-50, 1 << 30, 7, -(1 << 31)], dtype=torch.int32, device="cuda")
        launch_grouped(config, x, w, out, xs, ws, wrong)
        torch.cuda.synchronize()
        assert bool(out.isfinite().all())


@pytest.mark.parametrize("tokens", [0, 1, 16, 100, 500, 2000])
def test_the_operator_matches_its_reference(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    counts = torch.randint(0, 8, (tokens,), generator=generator).bincount(minlength=8).tolist()
    x = torch.randn(tokens, 384, generator=generator).to("cuda", torch.bfloat16)
    for layout in ("col_major", "row_major"):
        q, s = torch.ops.qcompiler.quantize(x, [1, 128], E4M3, "deepseek", layout)
        _, _, w, ws = operands(0, 8, 136, 384)
        got = grouped_linear(q, s, w, ws, ends_of(counts), *TILES, torch.bfloat16)
        want = grouped_linear(q.cpu(), s.cpu(), w.cpu(), ws.cpu(), ends_of(counts).cpu(), *TILES, torch.float32)
        assert_close(got, want.double().cuda())
    capacity = 64
    x = torch.randn(8, capacity, 384, device="cuda")
    q, s = torch.ops.qcompiler.quantize(x, [1, 128], E4M3, "vllm", "col_major")
    there = torch.randint(0, capacity + 1, (8,), generator=generator).to("cuda", torch.int32)
    got = torch.ops.qcompiler.grouped_linear_masked(q, s, w, ws, there, *TILES, torch.float16, 8)
    flat = exact(q.flatten(0, 1), s.flatten(0, 1), w, ws, [(g * capacity, (g + 1) * capacity) for g in range(8)])
    for group, count in enumerate(there.tolist()):
        assert_close(got[group, :count], flat.view(8, capacity, -1)[group, :count])


def test_one_cuda_graph_serves_all_routings() -> None:
    """A graph contains no host code, so everything that depends on new offsets happens on the device."""
    for config in CONFIGS:
        x, xs, w, ws = operands(512, 16, 256, 512)
        offsets = ends_of([32] * 16)
        out = torch.empty(512, 256, dtype=torch.bfloat16, device="cuda")
        launch_grouped(config, x, w, out, xs, ws, offsets)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch_grouped(config, x, w, out, xs, ws, offsets)
        for counts in ([512] + [0] * 15, [0] * 15 + [512], [1, 0, 200, 63, 5, 0, 0, 100, 3, 7, 11, 13, 17, 19, 23, 50]):
            offsets.copy_(ends_of(counts))
            out.fill_(math.nan)
            graph.replay()
            assert_close(out, exact(x, xs, w, ws, spans_of(counts)))


def test_sums_are_promoted_every_128_of_k() -> None:
    k = 32768  # equal signs make the sum grow, so an accumulator with 14 bits would lose ever more of each addend
    x, w = ((torch.rand(1, 256, k, device="cuda") * 0.5 + 0.5).to(E4M3) for _ in range(2))
    xs, ws = torch.full((k // 128, 256), 2.0**-4, device="cuda").T, torch.ones(1, 2, k // 128, device="cuda")
    want = exact(x[0], xs, w, ws, [(0, 256)])
    for config in CONFIGS:
        out = torch.empty(256, 256, device="cuda", dtype=torch.float16)
        launch_grouped(config, x[0], w, out, xs, ws, ends_of([256]))
        assert_close(out, want)


def test_weights_of_more_than_32_bits() -> None:
    groups, n, k = 80, 8192, 4096  # 2.7 GB
    w = torch.zeros(groups, n, k, dtype=torch.uint8, device="cuda").view(E4M3)
    w[-1] = torch.randn(n, k, device="cuda").to(E4M3)
    x, xs, _, ws = operands(400, groups, n, k)
    for config in CONFIGS:
        out = torch.full((400, n), math.nan, dtype=torch.bfloat16, device="cuda")
        launch_grouped(config, x, w, out, xs, ws, ends_of([0] * 78 + [100, 300]))
        assert bool((out[:100] == 0).all())
        assert_close(out[100:], exact(x[100:], xs[100:], w[-1:], ws[-1:], [(0, 300)]))


def test_problems_that_the_kernels_cannot_run_are_refused() -> None:
    x, xs, w, ws = operands(8, 2, 128, 256)
    ends = ends_of([4, 4])
    with pytest.raises(CodegenError, match=r"blocks of the activation: got \(1, 64\); need \(1, 128\)"):
        grouped_linear(x, xs, w, ws, ends, [1, 64], [128, 128], torch.bfloat16)
    narrow = w[:, :12].contiguous()
    with pytest.raises(CodegenError, match="output row of 24 bytes"):
        grouped_linear(x, xs, narrow, ws, ends, *TILES, torch.bfloat16)
    with pytest.raises(CodegenError, match="shape of the activation scales"):
        grouped_linear(x, xs[:, :1], w, ws, ends, *TILES, torch.bfloat16)
    with pytest.raises(CodegenError, match="device of the operands"):
        grouped_linear(x, xs, w, ws, ends.cpu(), *TILES, torch.bfloat16)


class Experts(torch.nn.Module):
    """A mixture of experts on torch's grouped GEMM."""

    def __init__(self) -> None:
        super().__init__()
        self.router = torch.nn.Linear(256, 8, bias=False)
        self.up = torch.nn.Parameter(torch.randn(8, 512, 256) / 16)
        self.down = torch.nn.Parameter(torch.randn(8, 256, 512) / 16)

    def forward(self, x: Tensor) -> Tensor:
        chosen, which = self.router(x).softmax(-1).topk(2)
        order = which.flatten().argsort(stable=True)
        counts = torch.nn.functional.one_hot(which.flatten(), 8).sum(0)
        offsets = counts.cumsum(0).to(torch.int32)
        inner = torch.nn.functional.silu(torch._grouped_mm(x[order // 2], self.up.transpose(-2, -1), offs=offsets))
        out = torch._grouped_mm(inner, self.down.transpose(-2, -1), offs=offsets)
        back = torch.empty_like(out).index_copy(0, order, out)
        result: Tensor = (back.view(-1, 2, 256) * chosen[..., None]).sum(1)
        return result


class BatchedExperts(torch.nn.Module):
    """All tokens through all experts, as batched matmuls."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Parameter(torch.randn(8, 256, 512) / 16)
        self.down = torch.nn.Parameter(torch.randn(8, 512, 256) / 16)

    def forward(self, x: Tensor) -> Tensor:
        spread = x.repeat(8, 1).view(8, -1, 256)
        return torch.bmm(torch.nn.functional.silu(torch.bmm(spread, self.up)), self.down).sum(0)


@pytest.mark.parametrize("kind", [Experts, BatchedExperts])
def test_compiled_experts(kind: type[torch.nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind().to("cuda", torch.bfloat16).eval()
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    fast = qcompiler.compile(model, example_inputs=(x,), scheme="fp8_tile")
    assert fast.source.count("kernels.grouped_linear(") == 2
    for tokens in (64, 1, 700):
        x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad():
            want = model(x).double()
        assert float((fast(x).double() - want).norm() / want.norm()) < 0.06
