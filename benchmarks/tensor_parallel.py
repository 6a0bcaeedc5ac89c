"""One rank of a Llama with random weights: our decoder on a mesh, torch's tensor parallelism in bf16, and their times.

All ranks call these functions in the same order, with the same arguments.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import transformers
from decoding import CACHE, compile_layers
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from whole_model import by_kernel

from codegen.peer_memory import PeerMemory
from qcompiler.decoding.decoder import Decoder
from qcompiler.decoding.sampling import Features
from qcompiler.decoding.slot_table import Rows, SlotTable
from qcompiler.decoding.step import all_logits
from qcompiler.distributed.communicator import Choices

LLAMA_3_70B: dict[str, Any] = {
    "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8,
    "vocab_size": 1024, "max_position_embeddings": 8192, "rope_theta": 500000.0, "tie_word_embeddings": False,
}  # fmt: skip
"""But for the vocabulary, so that layers are what is measured."""

SUMS = 10
"""Sums in a measured call."""

ROUND, MOST = 30.0, 64
"""Milliseconds of a round, and the most calls in it."""

TINY: dict[str, Any] = LLAMA_3_70B | {
    "hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip


def random_llama(sizes: dict[str, Any], layers: int, device: torch.device) -> Any:
    """The model in bf16, with the same weights on each rank; made on its device, where this takes less time."""
    torch.manual_seed(0)
    with torch.device("meta"):
        config = transformers.LlamaConfig(num_hidden_layers=layers, dtype=torch.bfloat16, **sizes)
        model = transformers.LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device=device).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.constant_(parameter, 1.0) if "norm" in name else torch.nn.init.normal_(parameter, std=0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device).eval()  # its buffers are computed
    return model.requires_grad_(False)


def prefill(llm: Decoder, tokens: int) -> Callable[[], Tensor]:
    """A call that computes the logits after a prompt."""
    zero = torch.zeros(1, dtype=torch.int64, device=llm.step.device)
    ids = (torch.arange(tokens, device=llm.step.device) % LLAMA_3_70B["vocab_size"])[None]
    return lambda: all_logits(llm.step(ids, zero, zero, torch.full_like(zero, tokens - 1), 0))


def decode(llm: Decoder, batch: int, context: int) -> Callable[[], Tensor]:
    """A call that decodes a token of each of `batch` sequences, which do not grow."""
    table, rows = SlotTable(llm.step), Rows.empty(batch, llm.step.device)
    table.lengths.fill_(context)
    table.load(rows, range(batch))
    return lambda: table.advance(rows, Features())


def parallelized(model: Any, mesh: DeviceMesh) -> Any:
    """The model in bf16, whose layers torch divides among the ranks, in place; each rank has its own heads."""
    columns, rows = ColwiseParallel(), RowwiseParallel()
    plan = {f"self_attn.{name}_proj": columns for name in "qkv"} | {"self_attn.o_proj": rows}
    plan |= {"mlp.gate_proj": columns, "mlp.up_proj": columns, "mlp.down_proj": rows}
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)
    return model


def bf16_prefill(model: Any, tokens: int, *, compiled: bool) -> Callable[[], Tensor]:
    """As `prefill`, without a cache; `compiled`: layers are compiled by torch.compile."""
    model.set_attn_implementation("sdpa")
    if compiled:
        compile_layers(model)
    ids = (torch.arange(tokens, device=model.device) % LLAMA_3_70B["vocab_size"])[None]
    return lambda: model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]


def bf16_decode(model: Any, batch: int, context: int, parts: int, *, compiled: bool) -> Callable[[], Tensor]:
    """As `decode`, over a static cache which the token fills; `parts`: ranks that share the heads."""
    model.set_attn_implementation("full_cache")
    if compiled:
        compile_layers(model)
    cache: Any = transformers.StaticCache(config=model.config, max_cache_len=context + 1)
    heads, size = model.config.num_key_value_heads // parts, model.config.head_dim
    cache.early_initialization(batch, heads, size, torch.bfloat16, model.device)
    counts = [layer.cumulative_length for layer in cache.layers if hasattr(layer, "cumulative_length")]
    ids = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
    place = torch.full((batch, 1), context, device=model.device)
    seen = torch.ones(batch, 1, 1, context + 1, dtype=torch.bool, device=model.device)
    named: dict[str, Any] = {CACHE: cache}

    def step() -> Tensor:
        for count in counts:  # of appended tokens: each step fills the last position
            count.fill_(context)
        out = model(ids, position_ids=place, attention_mask=seen, use_cache=True, **named)
        return out.logits[:, -1].argmax(-1)  # type: ignore[no-any-return]  # transformers has no types

    return step


def meet(value: float = 0.0) -> float:
    """Waits for all ranks, on their hosts; returns the largest of their values."""
    largest = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest)


def milliseconds(call: Callable[[], object], device: torch.device, *, alone: bool, rounds: int = 7) -> float:
    """The median time of a call, of the slowest rank in each round; on a GPU, of replays of a CUDA graph.

    All ranks run the same number of calls, so that their collectives match. Ranks start up to a tenth of a millisecond
    apart, so a round has many calls.

    Args:
        call: Called twice before it is measured.
        device: Where it runs.
        alone: Whether only this rank runs it.
        rounds: Number of measured rounds.
    """
    for _ in range(2):
        call()
    run = _recorded(call) if device.type == "cuda" else call
    once = _elapsed(run, 1, device, alone=alone)
    calls = max(1, min(MOST, int(ROUND / once)))
    return statistics.median(_elapsed(run, calls, device, alone=alone) for _ in range(rounds)) / calls


def _elapsed(run: Callable[[], object], calls: int, device: torch.device, *, alone: bool) -> float:
    """Milliseconds of some calls, of the slowest rank."""
    _wait(device)
    if not alone:
        meet()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    _wait(device)
    taken = 1e3 * (time.perf_counter() - start)
    return taken if alone else meet(taken)


def _recorded(call: Callable[[], object]) -> Callable[[], object]:
    """Replays of the call. Other threads, such as NCCL's, may use CUDA while it is captured."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        call()
    graph.replay()
    return graph.replay


def kernel_rows(call: Callable[[], object]) -> list[dict[str, Any]]:
    """Device time of the kernels of a call; all ranks run it."""
    run = _recorded(call)
    torch.cuda.synchronize()
    meet()
    return by_kernel(run)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def link_rows(mesh: DeviceMesh, device: torch.device, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Times of sums of bf16 over all ranks, by bytes.

    "GB/s" is what each rank sends and receives in a ring, 2 (n - 1) / n of the bytes, over the time of NCCL.
    """
    group, peers, rows = mesh.get_group("tp"), PeerMemory(), []
    for size in sizes:
        x = torch.zeros(size // 2, dtype=torch.bfloat16, device=device)
        taken = milliseconds(partial(_sums, x, group, SUMS), device, alone=False) / SUMS
        share = 2 * (group.size() - 1) / group.size()
        row = {"bytes": size, "us": 1e3 * taken, "GB/s": share * size / taken / 1e6, "peer memory us": None}
        if peers.all_reduce(x, group) is not None:
            taken = milliseconds(partial(_peer_sums, x, group, SUMS, peers), device, alone=False) / SUMS
            row["peer memory us"] = 1e3 * taken
        rows.append(row)
    return rows


def _sums(x: Tensor, group: Any, count: int) -> None:
    """Sums after one another, as functional collectives, which compiled models run."""
    for _ in range(count):
        torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x, "sum", group.group_name))


def _peer_sums(x: Tensor, group: Any, count: int, peers: PeerMemory) -> None:
    """Sums after one another, through the memory of the other GPUs."""
    for _ in range(count):
        peers.all_reduce(x, group)


class Sent(TorchDispatchMode):
    """Adds up the bytes that a rank sends in functional collectives, as the algorithm with the fewest bytes does.

    Attributes:
        bytes: Their number.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ranks, self._share, self.bytes = ranks, (ranks - 1) / ranks, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its collectives arrive here later
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0].rstrip("_")
        if name == "fused_reduce_quantize":  # also sums over ranks
            operands, *_, summed = args
            self.bytes += 2 * self._share * operands[summed].nbytes
        if name == "linear_scatter_tokens":  # each rank gets its rows, or all of a few rows
            rows, columns = args[0].shape[:-1].numel(), out.shape[-1]
            sums = 2 if out.shape[:-1].numel() == rows else 1
            self.bytes += sums * self._share * rows * columns * out.element_size()
        if name == "exchange":  # through peer memory
            *_, scattered, summed = args
            self.bytes += (
                self._share * args[0].nbytes * (1 if scattered else 2 if summed else round(1 / (1 - self._share)))
            )
        if name == "exchange_chosen":  # through peer memory; the rows that this call really sends
            x, experts, memories, _, groups, rank, _, summed = args
            rows = chosen_rows(Choices(experts, groups, memories.numel()), rank, summed=summed)
            self.bytes += rows * x.shape[1] * x.element_size()
        if func.namespace == "_c10d_functional":
            if name == "all_reduce":
                self.bytes += 2 * self._share * args[0].nbytes
            elif name.startswith(("all_gather", "all_to_all", "reduce_scatter")):
                self.bytes += self._share * max(args[0].nbytes, out.nbytes)
        return out


def chosen_rows(choices: Choices, rank: int, *, summed: bool) -> int:
    """The number of rows that a rank sends to others: terms of their tokens, or its own tokens."""
    owned = torch.arange(len(choices.experts), device=choices.experts.device) // choices.share
    if summed:
        return int((choices.of(rank) & (owned != rank)).sum())
    return sum(int((choices.of(other) & (owned == rank)).sum()) for other in range(choices.ranks) if other != rank)


def bytes_sent(call: Callable[[], object], ranks: int) -> float:
    """Bytes that a rank sends in a call, which must not be compiled by torch."""
    with Sent(ranks) as sent:
        call()
    return sent.bytes
