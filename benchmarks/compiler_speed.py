"""Compile time: the pipeline over a large model, and the import of the package.

    python benchmarks/compiler_speed.py [--out FOLDER]

The model is Llama-3-8B built from its configuration, with weights on the meta device. torch.export runs before the
clock starts and is listed separately; other times are the best of 3 runs. Imports are timed in fresh interpreters.
"""

import platform
import statistics
import subprocess
import sys
import time
from typing import Any

import harness
import torch
import transformers

import qcompiler
from codegen.host import emit_host_module
from qcompiler.capture import capture
from qcompiler.pass_manager import instruments
from qcompiler.pass_manager.runner import run_pipeline
from qcompiler.report.report import build_report

LLAMA_3_8B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0, "dtype": torch.bfloat16,
}  # fmt: skip
RUNS = 3
IMPORT = """
import sys, time
start = time.perf_counter()
import qcompiler
print(time.perf_counter() - start, "torch" in sys.modules)
"""


def measure(layers: int) -> dict[str, Any]:
    """One row: the model with `layers` layers."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_3_8B, num_hidden_layers=layers)).eval()
        ids = torch.zeros(2, 16, dtype=torch.int64)
    start = time.perf_counter()
    captured = capture(model, (ids,), allow_meta=True)
    capture_s = time.perf_counter() - start
    parameters = sum(tensor.numel() for tensor in captured.graph.weights.values())
    best = min((compiled(captured.graph) for _ in range(RUNS)), key=lambda row: row["after capture s"])
    return {"layers": layers, "parameters": parameters, "capture s": capture_s, **best}


def compiled(captured: qcompiler.Graph) -> dict[str, Any]:
    """Seconds from the captured graph to the text of the host module, one run."""
    graph, clock = (
        captured.clone(weights=False),
        instruments.TimePasses(),
    )  # without weight data, folding only rewrites the graph
    start = time.perf_counter()
    done = run_pipeline(qcompiler.pipeline("fp8_tile"), graph, instruments=[clock])
    passes_s = time.perf_counter() - start
    report = build_report(done.stages, graph, done.reasons)
    report_s = time.perf_counter() - start - passes_s
    host = emit_host_module(graph, "sm_90a")
    total_s = time.perf_counter() - start
    own_s = sum(milliseconds for _, milliseconds, _ in clock.rows) / 1e3
    slowest = max(clock.rows, key=lambda row: row[1])
    return {
        "operations": len(captured),
        "quantized": len(report.quantized),
        "host lines": host.source.count("\n"),
        "passes s": own_s,
        "slowest pass": f"{slowest[0]} {slowest[1] / 1e3:.2f} s",
        "verify, stages, reasons s": passes_s - own_s,
        "report s": report_s,
        "host s": total_s - passes_s - report_s,
        "after capture s": total_s,
    }


def import_seconds(runs: int = 9) -> float:
    """The median time of `import qcompiler` in a fresh interpreter; AssertionError if it loads torch."""
    times = []
    for _ in range(runs):
        text = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True).stdout.split()
        assert text[1] == "False", "import qcompiler loads torch"
        times.append(float(text[0]))
    return statistics.median(times)


def main() -> None:
    harness.arguments()
    transformers.utils.logging.set_verbosity_error()
    measure(1)  # warm-up
    rows = [measure(16), measure(32)]
    facts = {
        "import qcompiler, median s": f"{import_seconds():.3f}",
        "32 layers / 16 layers": f"{rows[1]['after capture s'] / rows[0]['after capture s']:.2f}",
        "cores": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    harness.report(
        "compiler-speed",
        "From captured graph to host module: seconds for Llama-3-8B with the scheme fp8_tile",
        rows,
        facts,
    )


if __name__ == "__main__":
    main()
