"""Layers of Llama-3-70B's widths on several GPUs: our decoder on a mesh against one GPU, and against torch's bf16 TP.

    python benchmarks/many_gpus.py --gpus 2 [--layers 8] [--batches 1,16,64] [--shardings "tp | tp; sp"]
                                   [--bf16 compiled|eager|none] [--out FOLDER]
    python benchmarks/many_gpus.py --smoke        # two processes with gloo on a CPU, tiny sizes

Starts one process for each GPU. Times are medians of CUDA-graph replays with their collectives captured; a round takes
as long as its slowest rank. "scaling" is the time on one GPU over the time on all. The bf16 model is divided by torch's
`parallelize_module`, and its layers are compiled by torch.compile. Bytes sent are counted on one rank, for a token.
"difference" compares logits with those of one GPU; for a decode step, it is the share of tokens that differ. The table
is also written before the bf16 model is measured, because torch.compile takes minutes. A second table has times of
sums alone, by NCCL and through the memory of the other GPUs, which `cost_model.py` takes; a third one the device time
of the kernels of rank 0, which include waiting for the other ranks.
"""

import argparse
import gc
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import harness
import tensor_parallel as tp
import torch
from torch import Tensor, multiprocessing
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import qcompiler

PREFILL, CONTEXT = 4096, 1024
SIZES = (1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26, 1 << 28)
"""Bytes of sums."""

TIMEOUT = timedelta(seconds=300)
"""After which a rank that waits for another one ends. torch.compile takes minutes."""

Row = dict[str, Any]


def main() -> int:
    given = options()
    if not given.smoke and torch.cuda.device_count() < given.gpus:
        print(f"not measured: needs {given.gpus} GPUs, this machine has {torch.cuda.device_count()}")
        return 0
    # Multicast over NVLink is left off: not every host that lends several of its GPUs supports it.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(rank_process, (given, f"file://{folder}/store"), nprocs=given.gpus)
    return 0


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batches", default="1,16,64")
    parser.add_argument("--shardings", default="tp | tp; sp", help="separated by |")
    parser.add_argument("--bf16", choices=("compiled", "eager", "none"), help="default: compiled")
    parser.add_argument("--smoke", action="store_true", help="two processes on a CPU, to check this program")
    given = parser.parse_known_args()[0]
    given.bf16 = given.bf16 or ("eager" if given.smoke else "compiled")
    given.batches = [int(batch) for batch in given.batches.split(",")]
    given.shardings = [each.strip() for each in given.shardings.split("|")]
    given.sizes, given.prefill, given.context = tp.LLAMA_3_70B, PREFILL, CONTEXT
    if given.smoke:
        given.sizes, given.prefill, given.context = tp.TINY, 64, 32
        given.layers, given.batches = 1, [1, 4]
    return given


def rank_process(rank: int, given: argparse.Namespace, store: str) -> None:
    kind = "cpu" if given.smoke else "cuda"
    device = torch.device(kind) if given.smoke else torch.device(kind, rank)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo" if kind == "cpu" else "cpu:gloo,cuda:nccl", init_method=store, rank=rank, world_size=given.gpus,
        timeout=TIMEOUT,
    )  # fmt: skip
    try:
        with torch.no_grad():
            measure(rank, given, device, init_device_mesh(kind, (given.gpus,), mesh_dim_names=("tp",)))
    except BaseException:
        traceback.print_exc()  # before the other ranks report that this one is gone
        raise
    tp.meet()
    sys.stdout.flush()
    if kind == "cuda":
        os._exit(0)  # destroying NCCL's communicators would wait for graphs that use them
    dist.destroy_process_group()


def measure(rank: int, given: argparse.Namespace, device: torch.device, mesh: DeviceMesh) -> None:
    """Measures the links, one GPU, all GPUs, and bf16."""
    links = tp.link_rows(mesh, device, SIZES[: 2 if given.smoke else None])
    if rank == 0:
        write("many-gpus-links", f"Sums over {given.gpus} GPUs in a CUDA graph", links, given)
    model = tp.random_llama(given.sizes, given.layers, device)
    say = partial(told, rank, time.perf_counter())
    decoder = partial(
        qcompiler.decoder, model, scheme="fp8_tile", kv_cache="fp8", max_batch=max(given.batches),
        max_length=max(given.prefill, given.context + 2), max_chunk=given.prefill, progress=False,
    )  # fmt: skip
    shapes = [None, *given.batches]
    alone: list[tuple[float, Tensor]] = []
    if rank == 0:
        alone = on_one(decoder(), [row_of(given, "", shape) for shape in shapes], device, say)
        free(device)
    tp.meet()
    rows: list[Row] = []
    kernels: list[Row] = []
    for sharding in given.shardings:
        new = [row_of(given, sharding, shape) for shape in shapes]
        on_all(decoder(mesh=mesh, sharding=sharding), new, alone, given, device, say, kernels)
        rows += new
        free(device)
        report(rank, rows, kernels, given)
    del decoder
    if given.bf16 != "none":
        bf16(tp.parallelized(model, mesh), rows, given, device, say)
        report(rank, rows, kernels, given)


def report(rank: int, rows: list[Row], kernels: list[Row], given: argparse.Namespace) -> None:
    """Writes the tables of the models."""
    if rank == 0:
        title = f"{given.layers} layers of Llama-3-70B's widths on {given.gpus} GPUs, fp8_tile with an FP8 cache"
        write("many-gpus", title, rows, given)
        if kernels:
            write("many-gpus-kernels", f"Device time of the kernels of rank 0, {given.layers} layers", kernels, given)


def on_one(
    llm: Any, rows: list[Row], device: torch.device, say: Callable[[object], None]
) -> list[tuple[float, Tensor]]:
    """Milliseconds and outputs of the whole model."""
    say(f"one GPU, compiled: {llm.memory}")
    found = []
    for row in rows:
        call = ours(llm, row)
        output = call().to("cpu", copy=True)
        found.append((tp.milliseconds(call, device, alone=True), output))
        say(f"batch {row['batch']}, {row['tokens']} tokens: {found[-1][0]:.3f} ms")
    return found


def on_all(
    llm: Any, rows: list[Row], alone: list[tuple[float, Tensor]], given: argparse.Namespace, device: torch.device,
    say: Callable[[object], None], kernels: list[Row],
) -> None:  # fmt: skip
    """Measures the model on the mesh; `alone` is what one GPU took and computed, on rank 0."""
    say(f"{given.gpus} GPUs, compiled: {llm.memory}")
    for index, row in enumerate(rows):
        call = ours(llm, row)
        got = call().to("cpu", copy=True)
        row["sent bytes"] = tp.bytes_sent(call, given.gpus) / tokens_of(row)
        row["fp8_tile ms"] = tp.milliseconds(call, device, alone=False)
        if device.type == "cuda":
            named = {name: row[name] for name in ("sharding", "batch", "tokens")}
            kernels += [named | each for each in tp.kernel_rows(call)]
        if alone:
            row["one GPU ms"], want = alone[index]
            row["scaling"] = row["one GPU ms"] / row["fp8_tile ms"]
            tokens = not want.is_floating_point()
            row["difference"] = float((got != want).float().mean()) if tokens else harness.relative_error(got, want)
        say(row)


def bf16(
    model: Any, rows: list[Row], given: argparse.Namespace, device: torch.device, say: Callable[[object], None]
) -> None:
    """Measures bf16 with torch's tensor parallelism. Its bytes are counted before its layers are compiled."""
    shapes = {(row["batch"], row["context"]): row for row in rows}
    sent = {
        shape: tp.bytes_sent(bf16_call(model, row, given.gpus), given.gpus) / tokens_of(row)
        for shape, row in shapes.items()
    }
    taken = {}
    for shape, row in shapes.items():
        call = bf16_call(model, row, given.gpus, compiled=given.bf16 == "compiled")
        taken[shape] = tp.milliseconds(call, device, alone=False)
        say(f"bf16, batch {row['batch']}, {row['tokens']} tokens: {taken[shape]:.3f} ms")
    for row in rows:
        shape = row["batch"], row["context"]
        row["bf16 ms"], row["bf16 sent bytes"] = taken[shape], sent[shape]
        row["times bf16"] = row["bf16 ms"] / row["fp8_tile ms"]
        row["bytes / bf16's"] = row["sent bytes"] / row["bf16 sent bytes"]


def row_of(given: argparse.Namespace, sharding: str, batch: int | None) -> Row:
    """A row without measurements: a prefill, or a decode step of a batch."""
    tokens, context = (given.prefill, 0) if batch is None else (1, given.context)
    names = (
        "one GPU ms", "fp8_tile ms", "scaling", "bf16 ms", "times bf16", "sent bytes", "bf16 sent bytes",
        "bytes / bf16's", "difference",
    )  # fmt: skip
    return {"sharding": sharding, "batch": batch or 1, "tokens": tokens, "context": context} | dict.fromkeys(names)


def ours(llm: Any, row: Row) -> Callable[[], Tensor]:
    if row["context"] == 0:
        return tp.prefill(llm, row["tokens"])
    return tp.decode(llm, row["batch"], row["context"])


def bf16_call(model: Any, row: Row, parts: int, *, compiled: bool = False) -> Callable[[], Tensor]:
    if row["context"] == 0:
        return tp.bf16_prefill(model, row["tokens"], compiled=compiled)
    return tp.bf16_decode(model, row["batch"], row["context"], parts, compiled=compiled)


def tokens_of(row: Row) -> int:
    return int(row["batch"] * row["tokens"])


def told(rank: int, start: float, what: object) -> None:
    if rank == 0:
        print(f"{time.perf_counter() - start:.0f} s: {what}", flush=True)


def write(name: str, title: str, rows: list[Row], given: argparse.Namespace) -> None:
    facts = {"ranks": str(given.gpus), "layers": str(given.layers), "bf16": given.bf16}
    facts |= {"torch": torch.__version__} if given.smoke else harness.machine()
    harness.report(f"{'smoke' if given.smoke else harness.device()}-{name}-{given.gpus}", title, rows, facts)


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
