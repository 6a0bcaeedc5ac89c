"""The experts of a mixture in vLLM over qcompiler's kernels, bit for bit, on one and on several simulated GPUs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from exact_sums import integers
from torch import Tensor
from torch.nn import functional

from qcompiler import QCompilerError, numerics
from qcompiler.checkpoints.layer_schemes import LayerSchemes
from qcompiler.schemes.named import spec_of

WHY = "needs vLLM: make engine"
experts: Any = pytest.importorskip("qcompiler.vllm.experts", reason=WHY)
activation: Any = pytest.importorskip("vllm.model_executor.layers.fused_moe.activation", reason=WHY)

EXPERTS, HIDDEN, NAME = 3, 160, "a.experts"
SOURCES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
Files = dict[str, list[tuple[Tensor, Tensor]]]
"""Part -> codes and scales of each expert."""


def layer_of(width: int, **changes: Any) -> Any:
    """What the method reads of vLLM's layer, on one GPU with `width` inner channels."""
    layer: Any = torch.nn.Module()
    moe = {"tp_rank": 0, "tp_size": 1, "has_bias": False, "is_act_and_mul": True, "num_logical_experts": EXPERTS}
    moe |= {key: value for key, value in changes.items() if key in moe}
    layer.moe_config = SimpleNamespace(**moe, moe_parallel_config=SimpleNamespace(use_ep=changes.get("use_ep", False)))
    layer.activation, layer.swiglu_limit, layer.apply_router_weight_on_input = (
        activation.MoEActivation.SILU,
        None,
        False,
    )
    layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name = SOURCES.values()
    layer._map_global_expert_id_to_local_expert_id = lambda expert: expert
    layer.width = width // layer.moe_config.tp_size
    return layer


def files(scheme: str, width: int) -> Files:
    shapes, spec = {"w1": (width, HIDDEN), "w3": (width, HIDDEN), "w2": (HIDDEN, width)}, spec_of(scheme)

    def quantized(w: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = numerics.quantize(w, spec.w)[:2]
        return codes, scale

    return {
        part: [quantized(integers(*shape, 7 * at + seed)) for at in range(EXPERTS)]
        for seed, (part, shape) in enumerate(shapes.items())
    }


def loaded(scheme: str, layer: Any, tensors: Files) -> Any:
    """The method, after the layer has the tensors of the files."""
    method = experts.QCompilerMoEMethod(spec_of(scheme), layer, NAME)
    method.create_weights(layer, EXPERTS, HIDDEN, layer.width, torch.float32)
    for part, each in tensors.items():
        for expert, pair in enumerate(each):
            for name, tensor in zip(("weight", "weight_scale"), pair, strict=True):
                stored = f"{'w2' if part == 'w2' else 'w13'}_{name}"
                parameter = getattr(layer, stored)
                assert parameter.weight_loader(parameter, tensor, f"{NAME}.{stored}", part, expert, True)
    method.process_weights_after_loading(layer)
    return method


def reference(scheme: str, tensors: Files, x: Tensor, weights: Tensor, ids: Tensor, columns: slice) -> Tensor:
    """The sum over the chosen experts of some inner channels, one token and expert at a time."""
    spec = spec_of(scheme)
    rows, block = slice(columns.start, columns.stop), spec.w.block
    scale_rows = slice(*(at if block[0] == 1 else -(-at // block[0]) for at in (rows.start, rows.stop)))
    scale_columns = slice(None) if block[1] == -1 else slice(rows.start // block[1], -(-rows.stop // block[1]))

    def multiply(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        x_q, x_s = numerics.quantize(x, spec.x)[:2]
        return numerics.scaled_linear(x_q, x_s, codes, scale, None, x_format=spec.x, w_format=spec.w, out_dtype=x.dtype)

    result = []
    for token, chosen in enumerate(ids):
        outer = []
        for at, expert in enumerate(chosen):
            (gate, gate_s), (up, up_s), (down, down_s) = (tensors[part][int(expert)] for part in SOURCES)
            given = x[token : token + 1]
            inner = functional.silu(multiply(given, gate[rows], gate_s[scale_rows]))
            inner = inner * multiply(given, up[rows], up_s[scale_rows])
            outer.append(multiply(inner, down[:, columns], down_s[:, scale_columns]) * weights[token, at])
        result.append(torch.stack(outer).sum(0))
    return torch.cat(result)


def check(found: Tensor, want: Tensor) -> None:
    """Equal up to the order of FP32 additions, whose error is relative to the largest numbers."""
    torch.testing.assert_close(found, want, rtol=0, atol=1e-6 * float(want.abs().max()))


def routed() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, weights and experts; one expert has no token."""
    ids = torch.tensor([[0, 2], [2, 0], [2, 0], [0, 2], [2, 0]], dtype=torch.int32)
    return integers(5, HIDDEN, 99), torch.rand(5, 2, generator=torch.Generator().manual_seed(1)), ids


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("scheme", "width"), [("fp8_tile", 256), ("fp8_row", 96), ("int8_row", 96)])
def test_experts_have_the_numbers_of_the_reference(scheme: str, width: int, world: int) -> None:
    tensors, (x, weights, ids) = files(scheme, width), routed()
    for rank in range(world):
        layer = layer_of(width, tp_rank=rank, tp_size=world)
        found = loaded(scheme, layer, tensors).apply(layer, x, weights, ids, None, None)
        columns = slice(layer.width * rank, layer.width * (rank + 1))
        check(found, reference(scheme, tensors, x, weights, ids, columns))


def test_a_width_between_blocks_is_padded() -> None:
    tensors, (x, weights, ids) = files("fp8_tile", 192), routed()
    layer = layer_of(192)
    method = loaded("fp8_tile", layer, tensors)
    assert layer.w13_weight.shape == (EXPERTS, 512, HIDDEN)
    found = method.apply(layer, x, weights, ids, None, None)
    check(found, reference("fp8_tile", tensors, x, weights, ids, slice(0, 192)))


def test_a_cut_inside_a_block_is_refused() -> None:
    layer = layer_of(384, tp_size=2)
    method = experts.QCompilerMoEMethod(spec_of("fp8_tile"), layer, NAME)
    with pytest.raises(QCompilerError, match=r"would cut 'a\.experts' inside a block: got 192 of 384 output channels"):
        method.create_weights(layer, EXPERTS, HIDDEN, layer.width, torch.float32)


@pytest.mark.parametrize(
    ("scheme", "changes", "why"),
    [
        ("fp8_tile", {"use_ep": True}, "without expert parallelism"),
        ("fp8_tile", {"has_bias": True}, "they have a bias"),
        ("fp8_tensor", {}, "a scale for a whole tensor"),
    ],
)
def test_unsupported_experts_are_refused(scheme: str, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(QCompilerError, match=rf"does not run the quantized experts 'a\.experts': .*{why}"):
        experts.QCompilerMoEMethod(spec_of(scheme), layer_of(256, **changes), NAME)


def test_a_scheme_that_the_device_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpu:
        is_cuda = staticmethod(lambda: True)

    monkeypatch.setattr(experts, "current_platform", Gpu)
    assert experts.QCompilerMoEMethod(spec_of("fp8_tile"), layer_of(256), NAME)
    with pytest.raises(QCompilerError, match="no GPU kernel runs experts in their scheme, only in 'fp8_tile'"):
        experts.QCompilerMoEMethod(spec_of("fp8_row"), layer_of(256), NAME)


def test_factors_of_input_channels_are_refused() -> None:
    schemes = LayerSchemes("int8_row", {}, frozenset({f"{NAME}.0.up_proj"}))
    with pytest.raises(
        QCompilerError, match=r"factors of the input channels of an expert: got 'a\.experts\.0\.up_proj'"
    ):
        experts.scheme_of_experts(schemes, layer_of(256), NAME)


def test_a_scale_that_the_files_lack_is_an_error() -> None:
    tensors = files("fp8_tile", 256)
    tensors["w2"].pop()
    with pytest.raises(QCompilerError, match=r"the files lack a scale, .*'a\.experts\.w2_weight_scale'"):
        loaded("fp8_tile", layer_of(256), tensors)


def test_the_scheme_of_experts() -> None:
    def of(**overrides: str | None) -> str | None:
        named = {f"{NAME}.{key.replace('__', '.')}": scheme for key, scheme in overrides.items()}
        found: str | None = experts.scheme_of_experts(LayerSchemes("fp8_tile", named), layer_of(256), NAME)
        return found

    everywhere = {f"{at}__{part}": None for at in ("0", "1", "2") for part in SOURCES.values()}
    renamed = {f"{at}__{part}": "fp8_row" for at in ("0", "1", "2") for part in SOURCES}
    assert of() == "fp8_tile"
    assert of(**dict.fromkeys(everywhere)) is None
    assert of(**renamed) == "fp8_row"
    for mixed in ({"0__down_proj": None}, {"0__w2": "fp8_row"}, everywhere | {"1__up_proj": "fp8_row"}):
        with pytest.raises(QCompilerError, match="computes the experts of a layer together, and they have different"):
            of(**mixed)
