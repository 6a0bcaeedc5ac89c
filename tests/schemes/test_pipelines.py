"""From specs to passes: which observe, which smooth, which quantize, and in what order."""

from dataclasses import replace
from itertools import product

import pytest

from passes.quantizing.calibrate import Calibrate
from passes.quantizing.fp8_tile import Fp8Tile
from passes.quantizing.quantize import Quantize
from passes.smoothing.smoothquant import SmoothQuant
from qcompiler.errors import PassError
from qcompiler.ir import DType
from qcompiler.ir.formats import FP8_BLOCK, FP8_CHANNEL, FP8_ROW, FP8_TENSOR, FP8_TILE, INT8_ROW
from qcompiler.pass_manager.pipeline import Pass, Pipeline
from qcompiler.schemes.named import changed
from qcompiler.schemes.pipelines import MIN_GAIN, SAMPLED_ROWS, QuantizationSpec, assemble

PRODUCERS = ["fuse-norm-quantize", "fuse-activation-quantize"]


def steps(*specs: QuantizationSpec) -> Pipeline:
    found = assemble({spec: ("*",) for spec in specs})
    assert Pipeline.parse(str(found)) == found
    return found


def test_the_default_is_deepseeks() -> None:
    assert str(steps(QuantizationSpec())) == (
        "canonicalize; attention; dead-code; merge-linears; fp8-tile; share-quantize; fuse-linear; fold-constants; "
        "dead-code; to-kernels; gather-codes; fuse-norm-quantize; fuse-activation-quantize; fuse-epilogue"
    )


def test_every_spec_prints_and_parses() -> None:
    for x, w, dtype, smooth in product(
        (FP8_TILE, FP8_ROW, FP8_TENSOR, FP8_CHANNEL),
        (FP8_BLOCK, FP8_ROW, FP8_TENSOR),
        (DType.f8e4m3fn, DType.i8),
        ("never", "always", "measured"),
    ):
        x, w = replace(x, element=dtype), replace(w, element=dtype)
        spec = QuantizationSpec(x, w, smooth=smooth)  # type: ignore[arg-type]  # of a product mypy knows no literals
        smoothing, quantize = spec.passes(("a", "!b"))
        assert isinstance(quantize, Quantize) and quantize.layers == ("a", "!b")
        assert isinstance(quantize, Fp8Tile) == (x.block[0] == 1 and w == FP8_BLOCK)
        assert (quantize.x_format, quantize.w_format) == (x, w)
        assert spec.needs_calibration == (smoothing is not None) == (smooth != "never")
        if isinstance(smoothing, SmoothQuant):
            assert (smoothing.x_format, smoothing.w_format) == (x, w)
            assert smoothing.min_gain == (MIN_GAIN if smooth == "measured" else None)
            assert smoothing.layers == quantize.layers
        steps(spec)


@pytest.mark.parametrize(
    ("specs", "calibration"),
    [
        ([QuantizationSpec()], []),
        ([QuantizationSpec(FP8_TENSOR, static=True)], ["calibrate"]),
        ([QuantizationSpec(FP8_TENSOR, static=True, observer="minmax")], ["calibrate"]),
        ([QuantizationSpec(FP8_TENSOR, static=True, observer="percentile")], ["calibrate{histogram=true}"]),
        ([QuantizationSpec(FP8_TENSOR, static=True, observer="mse")], ["calibrate{histogram=true}"]),
        ([QuantizationSpec(observer="mse")], []),  # nothing is static
        ([QuantizationSpec(smooth="always")], ["calibrate", "smoothquant"]),
        ([QuantizationSpec(smooth="always", alpha="search")], [f"calibrate{{rows={SAMPLED_ROWS}}}", "smoothquant"]),
        ([QuantizationSpec(smooth="measured")], [f"calibrate{{rows={SAMPLED_ROWS}}}", "smoothquant"]),
        # The histogram of what is smoothed is that of other numbers afterwards.
        ([QuantizationSpec(smooth="always", x=FP8_TENSOR, static=True, observer="mse")],
         ["calibrate", "smoothquant", "calibrate{histogram=true}"]),
        ([QuantizationSpec(smooth="always", x=FP8_TENSOR, static=True)], ["calibrate", "smoothquant"]),
        ([QuantizationSpec(smooth="always"), QuantizationSpec(FP8_TENSOR, static=True, observer="mse")],
         ["calibrate{histogram=true}", "smoothquant"]),
        ([QuantizationSpec(), QuantizationSpec(FP8_TENSOR, static=True)], ["calibrate"]),
    ],
)  # fmt: skip
def test_what_calibration_is_asked_for(specs: list[QuantizationSpec], calibration: list[str]) -> None:
    found = steps(*specs)
    kinds = (Calibrate, SmoothQuant)
    assert [str(s) if isinstance(s, Calibrate) else s.name for s in found if isinstance(s, kinds)] == calibration


def test_the_order_of_several_specs() -> None:
    found = steps(
        QuantizationSpec(smooth="always"), QuantizationSpec(FP8_ROW, FP8_ROW), QuantizationSpec(INT8_ROW, INT8_ROW)
    )
    assert found.names == (
        "canonicalize", "attention", "dead-code", "calibrate", "smoothquant", "merge-linears", "merge-linears#2",
        "merge-linears#3", "fp8-tile", "quantize", "quantize#2", "share-quantize", "fuse-prescale", "fuse-linear",
        "fold-constants", "dead-code#2", "to-kernels", "gather-codes", "fuse-norm-quantize", "fuse-activation-quantize",
        "fuse-epilogue",
    )  # fmt: skip


def test_profiles() -> None:
    def profile(**options: str) -> str:
        step: Pass = changed(QuantizationSpec(), **options).passes()[1]  # type: ignore[arg-type]  # words from the tests below
        assert isinstance(step, Quantize) and step.x_format.profile == step.w_format.profile
        return step.x_format.profile

    assert (profile(), profile(numerics="vllm"), profile(scale="ue8m0")) == ("deepseek", "vllm", "ue8m0")
    assert profile(numerics="ue8m0", scale="ue8m0") == profile(numerics="ue8m0") == "ue8m0"
    for name in ("deepgemm", "vllm"):
        with pytest.raises(PassError, match=f"support power-of-two scales: got {name}; need numerics=deepseek"):
            profile(numerics=name, scale="ue8m0")


@pytest.mark.parametrize(
    ("specs", "fusing"),
    [
        ([QuantizationSpec()], ["gather-codes", *PRODUCERS, "fuse-epilogue"]),
        ([QuantizationSpec(FP8_ROW, FP8_ROW)], PRODUCERS),
        ([QuantizationSpec(INT8_ROW, INT8_ROW), QuantizationSpec(replace(FP8_TILE, block=(1, 64)))], PRODUCERS),
        ([QuantizationSpec(FP8_TENSOR, FP8_TENSOR)], []),
        ([QuantizationSpec(FP8_CHANNEL, FP8_ROW)], []),
        (
            [QuantizationSpec(FP8_TENSOR, FP8_ROW, static=True), QuantizationSpec()],
            ["gather-codes", *PRODUCERS, "fuse-epilogue"],
        ),
    ],
)
def test_what_is_fused_with_the_kernels(specs: list[QuantizationSpec], fusing: list[str]) -> None:
    names = steps(*specs).names
    assert list(names[names.index("to-kernels") + 1 :]) == fusing
