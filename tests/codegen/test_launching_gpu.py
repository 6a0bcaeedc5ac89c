"""Launches on a Hopper GPU: recorded calls use the right operands on any stream, under capture, and with hooks."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import triton
from torch import Tensor

import codegen.torch_ops  # noqa: F401  (registers the operators)
from codegen.direct import kernels, unobserved
from codegen.launching import launch as launching
from codegen.launching import replay
from qcompiler import numerics
from qcompiler.errors import CodegenError

pytestmark = pytest.mark.gpu

E4M3 = torch.float8_e4m3fn
SPEC = ([1, 128], E4M3, "deepseek", "col_major")


def weight(n: int, k: int) -> tuple[Tensor, Tensor]:
    w, ws = kernels.quantize(torch.randn(n, k, device="cuda"), [128, 128], E4M3, "deepseek", "row_major")
    return w, ws


def linear(x: Tensor, w: Tensor, ws: Tensor, bias: Tensor | None = None) -> Tensor:
    q, scale = kernels.quantize(x, *SPEC)
    out: Tensor = kernels.scaled_linear(q, scale, w, ws, bias, [1, 128], [128, 128], torch.float32)
    return out


def exact(x: Tensor, w: Tensor, ws: Tensor) -> Tensor:
    codes, scale = numerics.quantize(x)
    return numerics.scaled_linear(codes, scale, w, ws, None, out_dtype=torch.float32)


def close(got: Tensor, want: Tensor) -> bool:
    return bool((got - want).norm() <= 1e-3 * want.norm())


def test_all_kernels_are_launched_directly() -> None:
    w, ws = weight(512, 1024)
    for rows in (1, 16, 300, 5000):
        linear(torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16), w, ws)
    paths = {str(kernel.compiled.name): kernel.path for kernel in launching._COMPILED.values()}
    assert paths and set(paths.values()) == {"direct"}, paths


@pytest.mark.parametrize("rows", [1, 16, 17, 200, 700])
def test_later_operands_are_used_instead_of_the_first(rows: int) -> None:
    weights = [weight(512, 1024) for _ in range(3)]
    kept = [torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16) for _ in range(6)]
    results = [(x, pair, linear(x, *pair)) for x in kept for pair in weights]
    for x, pair, out in results:
        assert close(out, exact(x, *pair))
    q, scale = kernels.quantize(kept[-1], *SPEC)
    want_q, want_scale = numerics.quantize(kept[-1])
    assert torch.equal(q.view(torch.uint8), want_q.view(torch.uint8)) and torch.equal(scale, want_scale)


def test_memory_reused_by_another_shape() -> None:
    w, ws = weight(256, 512)
    for rows in (64, 128, 64, 32, 128, 96) * 3:
        x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
        assert close(linear(x, w, ws), exact(x, w, ws))
        del x


@pytest.mark.parametrize("block", [(1, 64), (1, -1), (-1, -1)])
@pytest.mark.parametrize("dtype", [E4M3, torch.int8])
def test_every_granularity_twice(block: tuple[int, int], dtype: torch.dtype) -> None:
    factors = torch.rand(384, device="cuda") + 0.5
    for seed in range(3):
        torch.manual_seed(seed)
        for x in (torch.randn(40, 384, device="cuda"), torch.randn(2, 5, 384, device="cuda")):
            q, scale = kernels.quantize(x, block, dtype, "deepseek", "row_major", factors)
            want_q, want_scale = numerics.quantize(x, numerics.format_of(block, dtype, "deepseek"), factors)
            assert torch.equal(q.view(torch.uint8), want_q.view(torch.uint8)) and torch.equal(scale, want_scale)
            again = kernels.quantize_static(x, scale, block, dtype, "deepseek", factors)
            assert torch.equal(again.view(torch.uint8), q.view(torch.uint8))


def test_views_and_operands_that_share_memory() -> None:
    both = torch.randn(2, 64, 512, device="cuda", dtype=torch.bfloat16)
    w, ws = weight(256, 512)
    strided = torch.randn(64, 1024, device="cuda", dtype=torch.bfloat16)
    for x in (both[1], strided[:, :512], strided[:, 512:], both[0], strided[:, :512], both.transpose(0, 1)):
        assert close(linear(x, w, ws), exact(x.contiguous(), w, ws).view(*x.shape[:-1], 256))
    x, xs = kernels.quantize(torch.randn(256, 256, device="cuda"), [-1, -1], E4M3, "deepseek", "row_major")
    y, ys = kernels.quantize(torch.randn(256, 256, device="cuda"), [-1, -1], E4M3, "deepseek", "row_major")
    for left, ls, right, rs in ((x, xs, x, xs), (x, xs, y, ys), (y, ys, x, xs)):
        out = kernels.scaled_linear(left, ls, right, rs, None, [-1, -1], [-1, -1], torch.float32)
        want = (left.float() * ls) @ (right.float() * rs).T
        assert close(out, want)


def test_the_current_stream_is_used() -> None:
    w, ws = weight(256, 512)
    x = torch.zeros(64, 512, device="cuda", dtype=torch.bfloat16)
    linear(x, w, ws), linear(x, w, ws)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(1.0)
        out = linear(x, w, ws)
    stream.synchronize()
    assert close(out, exact(torch.ones_like(x), w, ws))


@contextmanager
def hook(called: list[str]) -> Iterator[None]:
    def enter(metadata: object) -> None:
        called.append(metadata.get()["name"])  # type: ignore[attr-defined]

    triton.knobs.runtime.launch_enter_hook.add(enter)
    try:
        yield
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(enter)


def test_launch_hooks_are_called() -> None:
    w, ws = weight(256, 512)
    x = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16)
    want = linear(x, w, ws)
    called: list[str] = []
    with hook(called):
        assert torch.equal(linear(x, w, ws), want)
    assert called[0] == "quantize_tiles" and len(called) >= 2
    count = len(called)
    linear(x, w, ws)
    assert len(called) == count


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_cold_kernel_under_capture_is_refused_and_a_warm_one_captured() -> None:
    w, ws = weight(384, 768)
    x = torch.randn(48, 768, device="cuda", dtype=torch.bfloat16)
    kept = dict(launching._COMPILED)
    launching._COMPILED.clear()
    replay.forget()
    torch.cuda.synchronize()
    says = r"not compiled yet.*quantize_tiles\(bfloat16\[48, 768\], .*compiled.warmup"
    with pytest.raises(CodegenError, match=says), torch.cuda.graph(torch.cuda.CUDAGraph()):
        linear(x, w, ws)
    launching._COMPILED.update(kept)
    linear(x, w, ws)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = linear(x, w, ws)
    x.normal_()
    graph.replay()
    assert close(captured, exact(x, w, ws))


def test_traced_calls_go_through_the_dispatcher() -> None:
    x = torch.randn(8, 256, device="cuda", dtype=torch.bfloat16)
    assert unobserved(x) and unobserved(x.cpu())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        assert not unobserved(x)
        kernels.quantize(x, *SPEC)
    assert "qcompiler::quantize" in {event.name for event in profile.events()}
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        q, _ = kernels.quantize(x, *SPEC)
    assert type(q) is not Tensor and q.shape == x.shape
