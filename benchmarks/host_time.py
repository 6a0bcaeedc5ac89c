"""Host time a token: what the generation loop costs beyond the decode steps that it launches.

    python benchmarks/host_time.py [--out FOLDER] [--batches 1,16,64]
    python benchmarks/host_time.py --gpu [--model FOLDER]       with recorded steps of a model

On a CPU, decode steps do nothing, so the CPU time of a run is the time of the loop. On a GPU, the wall time of a run is
compared with equally many replays of the same CUDA graph in a row. Without a folder, the model has the sizes of
SmolLM2-135M and random weights: what it generates does not matter.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import harness
import torch
import transformers
from torch import Tensor

import qcompiler
from qcompiler.decoding.graphs import CudaRecorder, RecordedDecode
from qcompiler.decoding.loop import Loop
from qcompiler.decoding.requests import Request
from qcompiler.decoding.sampling import Features
from qcompiler.decoding.slot_table import SlotTable
from qcompiler.decoding.step import Step

CONTEXT, NEW, ROUNDS = 16, 400, 7

SMOLLM2: dict[str, Any] = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip


class NoStep:
    """A step that does nothing."""

    vocabulary, capacity, device = 64, CONTEXT + NEW + 1, torch.device("cpu")
    chunk = capacity

    def __init__(self, slots: int) -> None:
        self.slots = slots

    def __call__(
        self, input_ids: Tensor, slots: Tensor, lengths: Tensor, last: Tensor, start: int | None = None
    ) -> Tensor:
        return torch.zeros(len(input_ids), self.vocabulary)

    def keeps(self, start: int, written: int) -> bool:
        return True

    def reset(self) -> None:
        pass


class NoRecorder:
    """Records nothing, and replays nothing."""

    nbytes = 0

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        tokens = run().clone()
        return lambda: tokens


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=harness.RESULTS)
    parser.add_argument("--batches", default="1,16,64")
    parser.add_argument("--gpu", action="store_true", help="measure recorded steps")
    parser.add_argument("--model", help="with --gpu, a folder of a language model; default: random weights")
    options = parser.parse_args()
    sys.argv = [sys.argv[0], "--out", str(options.out)]  # the harness parses only --out
    batches = [int(batch) for batch in options.batches.split(",")]
    title = "Host time of the generation loop"
    if not options.gpu:
        torch.set_num_threads(1)
        rows = [{"batch": batch, "us a step": loop_alone(batch)} for batch in batches]
        facts = {"torch": torch.__version__, "time": f"CPU time, best of {ROUNDS} runs of {NEW} steps that do nothing"}
        harness.report("host-time", title, rows, facts)
        return
    llm = qcompiler.decoder(
        options.model or random_model(), scheme="fp8_tile", kv_cache="fp8", max_batch=max(batches),
        max_length=CONTEXT + NEW + 1, target="cuda",
    )  # fmt: skip
    harness.gpu_report("host-time", title, [beyond_replays(llm.step, batch) for batch in batches])


def random_model() -> torch.nn.Module:
    """A language model of the sizes of SmolLM2-135M on the GPU, in bf16."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMOLLM2))
    return model.to("cuda", torch.bfloat16).eval()


def loop_alone(batch: int) -> float:
    """Microseconds of CPU time a step."""
    table = SlotTable(NoStep(batch))
    loop = Loop(table, RecordedDecode(table, NoRecorder()), lag=1)
    return 1e6 * min(seconds(loop, batch, NEW, time.process_time) for _ in range(ROUNDS)) / NEW


def beyond_replays(step: Step, batch: int) -> dict[str, Any]:
    """A row: wall time a step of the loop and of replays alone, each the best of several runs."""
    table = SlotTable(step)
    decode = RecordedDecode(table, CudaRecorder(step.device))
    loop = Loop(table, decode)
    seconds(loop, batch, 2, time.perf_counter)  # records the step
    prefill = min(seconds(loop, batch, 1, time.perf_counter) for _ in range(ROUNDS))
    run = min(seconds(loop, batch, 1 + NEW, time.perf_counter) for _ in range(ROUNDS))
    replays = min(replayed(table, decode, range(batch)) for _ in range(ROUNDS))
    each = 1e6 * (run - prefill) / NEW, 1e6 * replays / NEW
    return {"batch": batch, "us a step": each[0], "us a replay": each[1], "us beyond": each[0] - each[1]}


def seconds(loop: Loop, batch: int, new: int, clock: Callable[[], float]) -> float:
    """The time of a run of equal prompts."""
    requests = [Request([1] * CONTEXT, new) for _ in range(batch)]
    start = clock()
    for _ in loop.run(requests):
        pass
    return clock() - start


def replayed(table: SlotTable, decode: RecordedDecode, slots: Sequence[int]) -> float:
    """The wall time of as many steps as a run has, enqueued without waiting, over the same lengths."""
    table.lengths.fill_(CONTEXT)
    step = decode.prepare(slots, Features())
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(NEW):
        step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    with torch.no_grad():
        main()
