"""Trains the small language model of tiny_lm.py on the source of Python's standard library.

    python examples/train_tiny_lm.py --minutes 3 --output tiny_lm.safetensors

The run lasts the given time: the learning rate follows the elapsed share of it and is zero at the end. Three minutes on
a Hopper GPU are enough; a CPU takes some hundred times longer for the same steps.
"""

import argparse
import functools
import math
import platform
import time
from pathlib import Path
from typing import Any

import tiny_lm
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from qcompiler.files.replacing import replacing_file

WARM_UP = 0.03
"""The share of the time for learning-rate warmup."""


def main() -> None:
    """Trains the model, prints progress, and writes the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0, help="how long to train")
    parser.add_argument("--batch", type=int, default=64, help=f"windows of {tiny_lm.CONTEXT} bytes in a step")
    parser.add_argument("--rate", type=float, default=2e-3, help="the largest learning rate")
    parser.add_argument("--dropout", type=float, default=0.1, help="dropout on each block's residual contribution")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--every", type=int, default=500, help="steps between progress lines")
    parser.add_argument("--held-out-bytes", type=int, help="evaluate only on the first bytes of the held-out text")
    parser.add_argument("--output", type=Path, default=tiny_lm.WEIGHTS, help="the file to write")
    options = parser.parse_args()
    if options.minutes <= 0:
        parser.error(f"--minutes must be positive: got {options.minutes}")

    torch.manual_seed(options.seed)
    training = tiny_lm.text(held_out=False).to(options.device)
    held_out = tiny_lm.text(held_out=True)[: options.held_out_bytes].to(options.device)
    model = initialized(options.dropout).to(options.device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters, {len(training):,} bytes to train on, {len(held_out):,} held out", flush=True)

    steps = train(model, training, held_out, options)
    model = model.bfloat16()
    reached = tiny_lm.loss(model, held_out)
    write(
        options.output,
        model,
        {
            "held_out_bytes": f"{len(held_out)}",
            "held_out_loss": f"{reached:.4f}",
            "held_out_unit": "nats per byte",
            "parameters": f"{parameters}",
            "python": platform.python_version(),
            "seed": f"{options.seed}",
            "steps": f"{steps}",
            "torch": torch.__version__,
            "training_bytes": f"{len(training)}",
            "windows_per_step": f"{options.batch}",
        },
    )
    print(f"{steps} steps; held out, in bf16: {figures(reached)}; wrote {options.output.name}")


def initialized(dropout: float) -> tiny_lm.TinyLM:
    """A new model; projections into the residual stream start smaller and have dropout during training."""
    model = tiny_lm.TinyLM()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            writes = name.endswith(("attention.out.weight", "mlp.down.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * model.config.layers) if writes else 0.02)
    for module in model.modules():
        if isinstance(module, tiny_lm.Attention | tiny_lm.MLP):
            module.register_forward_hook(functools.partial(dropped, share=dropout))
    return model


def dropped(module: nn.Module, _: Any, output: Tensor, *, share: float) -> Tensor:
    """A hook that applies dropout to a module's output."""
    return functional.dropout(output, share, module.training)


def train(model: tiny_lm.TinyLM, training: Tensor, held_out: Tensor, options: argparse.Namespace) -> int:
    """Trains for `options.minutes`, leaves the model in evaluation mode, and returns the number of steps."""
    optimizer = torch.optim.AdamW(parameter_groups(model), betas=(0.9, 0.95), fused=training.is_cuda)
    autocast = torch.autocast(training.device.type, torch.bfloat16, enabled=training.is_cuda)
    positions = torch.arange(tiny_lm.CONTEXT + 1, device=training.device)
    started, step = time.perf_counter(), 0
    while (elapsed := (time.perf_counter() - started) / (60 * options.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = options.rate * schedule(elapsed)
        starts = torch.randint(len(training) - tiny_lm.CONTEXT, (options.batch, 1), device=training.device)
        ids = training[starts + positions].long()
        with autocast:
            logits = model(ids[:, :-1])
        loss = functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % options.every == 0:
            model.eval()
            with autocast:
                reached = tiny_lm.loss(model, held_out, batch=64)
            model.train()
            seconds = time.perf_counter() - started
            line = f"{seconds:6.1f} s  step {step:6}  training {figures(loss.item())}  held out {figures(reached)}"
            print(line, flush=True)
        step += 1
    model.eval()
    return step


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weight decay for matrices, none for gains."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    gains = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]


def schedule(elapsed: float) -> float:
    """The share of the peak learning rate at an elapsed share of the time: linear warmup, then cosine decay to zero."""
    return min(elapsed / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * max(0.0, elapsed - WARM_UP) / (1 - WARM_UP)))


def figures(loss: float) -> str:
    """A loss in nats and in bits."""
    return f"{loss:.4f} nats ({loss / math.log(2):.4f} bits) per byte"


def write(path: Path, model: nn.Module, metadata: dict[str, str]) -> None:
    """Writes the weights atomically."""
    data = save({name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as partial:
        partial.write_bytes(data)


if __name__ == "__main__":
    main()
