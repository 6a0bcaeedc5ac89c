"""Host time of a call: how long Python is busy until a kernel is enqueued.

    python benchmarks/launch_overhead.py [--out FOLDER]

Microseconds, the median over bursts of calls; the device catches up between bursts, so no call waits for it. Each
operator is measured three ways: as a host module calls it, through torch's dispatcher, and without cached launch plans
(as for operands with a new description). The second table lists the cost of the parts on this machine; a call needs at
least a launch and an allocation.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import harness
import torch

import codegen.torch_ops  # noqa: F401  (registers the operators)
from codegen.direct import kernels
from codegen.launching import replay
from codegen.targets.hopper import HOPPER
from codegen.templates.gemm import GEMM, GemmOperands, GemmProblem, bucket

E4M3 = torch.float8_e4m3fn
ROWS, SIZES = (1, 16, 256, 4096), ((4096, 7168), (4096, 4096))
BURST = 50
"""Calls between two synchronizations; a synchronization takes far longer than a call."""


def microseconds(call: Callable[[], object], rounds: int = 15) -> float:
    """Host time of one call."""
    for _ in range(5):
        call()
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(BURST):
            call()
        times.append((time.perf_counter() - start) / BURST * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times)


def in_full(call: Callable[[], object]) -> float:
    """Host time of one call that finds only compiled kernels in its caches."""

    def forgetful() -> None:
        replay.forget()
        call()

    return microseconds(forgetful)


def measure(m: int, n: int, k: int) -> dict[str, Any]:
    """One row of the table."""
    left = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    right = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    recipe = ([1, 128], E4M3, "deepseek", "col_major")
    x, xs = kernels.quantize(left, *recipe)
    w, ws = kernels.quantize(right, [128, 128], E4M3, "deepseek", "row_major")
    last = (x, xs, w, ws, None, [1, 128], [128, 128], torch.bfloat16)
    out = kernels.scaled_linear(*last)
    config = GEMM.family(HOPPER).choose(GemmProblem(bucket(m), n, k))
    operators, operands = torch.ops.qcompiler, GemmOperands(x, w, out, xs, ws)
    return {
        "M, N, K": f"{m}, {n}, {k}",
        "quantize": microseconds(lambda: kernels.quantize(left, *recipe)),
        "quantize, dispatched": microseconds(lambda: operators.quantize(left, *recipe)),
        "quantize, in full": in_full(lambda: kernels.quantize(left, *recipe)),
        "scaled_linear": microseconds(lambda: kernels.scaled_linear(*last)),
        "scaled_linear, dispatched": microseconds(lambda: operators.scaled_linear(*last)),
        "scaled_linear, in full": in_full(lambda: kernels.scaled_linear(*last)),
        "launch_gemm": microseconds(partial(GEMM.family(HOPPER).launch, config, operands)),
        "torch.mm": microseconds(lambda: torch.mm(left, right.T)),
        "configuration": str(config),
    }


def parts() -> list[dict[str, Any]]:
    """Host time of each part of a call."""
    x, out = (torch.randn(16, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    replay.forget()
    for _ in range(2):
        kernels.quantize(x, [1, 128], E4M3, "deepseek", "col_major")
    ((known,),) = replay._KNOWN.young.values()
    plan = known.plan
    kernel, enqueue, template, _, _ = plan.launches[0]
    q, scale = (make() for make in plan.makers)
    template[:3] = [each.data_ptr() for each in (x, q, scale)]
    rest = [template] if kernel.listed else template
    named: dict[str, Callable[[], object]] = {
        f"one launch by the C function, {kernel.path}": partial(enqueue, 0, *kernel.head, *rest),
        "one allocation": plan.makers[0],
        "quantize, remembered: 2 allocations and 1 launch": lambda: plan.run([x.data_ptr()]),
        "torch.add, for comparison": lambda: torch.add(x, 1, out=out),
    }
    return [{"part": name, "us": microseconds(each)} for name, each in named.items()]


def main() -> None:
    harness.arguments()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    rows = [measure(m, n, k) for m in ROWS for n, k in SIZES]
    harness.gpu_report("launch-overhead", "Host time of a call, microseconds", rows)
    harness.gpu_report("launch-parts", "Host time of the parts of a call, microseconds", parts())


if __name__ == "__main__":
    main()
