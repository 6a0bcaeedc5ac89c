"""Tensors stored with a quantized weight: the static scale of its activation, and zero points.

mlp.up_proj.weight               codes
mlp.up_proj.weight_scale         scales of the codes
mlp.up_proj.input_scale          static scale of the activation, one number ("activation_scale" in Mistral's files)
mlp.up_proj.weight_zero_point    accepted if all zero: the codes are symmetric
experts.gate_up_proj             stacked experts; names of their scales begin with "gate_up_proj_"
"""

import math

import torch

from qcompiler.checkpoints.files import TensorFiles
from qcompiler.checkpoints.quantized_weight import SCALE_DTYPES
from qcompiler.errors import QCompilerError

WEIGHT = "weight"
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
X_SCALES = ("input_scale", "activation_scale")
ZERO_POINTS = (
    "weight_zero_point", "input_zero_point", "output_zero_point", "activation_zero_point", "weight_offset",
    "input_offset",
)  # fmt: skip
"""Names from compressed-tensors, ModelOpt, and Ascend's tools."""


def stem(weight: str) -> str:
    """The prefix of the names of tensors stored with a weight."""
    module, _, key = weight.rpartition(".")
    return f"{module}." * bool(module) if key == WEIGHT else f"{weight}_"


def fp8_weights(tensors: TensorFiles) -> list[str]:
    """Names of the FP8 tensors of a folder that are not zero points."""
    return [name for name in tensors if tensors.dtype(name) in FP8 and not name.endswith(ZERO_POINTS)]


def scale_beside(weight: str, tensors: TensorFiles, suffixes: tuple[str, ...]) -> str:
    """The name of a weight's scale: with the first of `suffixes` that exists, or else the first suffix."""
    names = [weight + suffix for suffix in suffixes]
    names += [f"{weight}_{WEIGHT}{suffix}" for suffix in suffixes if not weight.endswith(WEIGHT)]
    return next((name for name in names if name in tensors), names[0])


def x_scale_beside(weight: str, tensors: TensorFiles) -> str:
    """The name of a weight's static activation scale: the first that exists, or else the usual one.

    Raises:
        QCompilerError: There are two scales, or a scale is not a positive finite number.
    """
    names = [stem(weight) + name for name in X_SCALES if stem(weight) + name in tensors]
    if len(names) > 1:
        raise QCompilerError(f"'{weight}' has two activation scales", got=", ".join(names), need="one")
    if not names:
        return stem(weight) + X_SCALES[0]
    shape = tensors.shape(weight)
    _check_x_scale(names[0], tensors, experts=shape[0] if len(shape) == 3 else 1)
    return names[0]


def zero_points_beside(weight: str, tensors: TensorFiles) -> tuple[str, ...]:
    """Names of a weight's zero points, all of which are zero.

    Raises:
        QCompilerError: A zero point is not zero: the codes are asymmetric.
    """
    names = tuple(stem(weight) + name for name in ZERO_POINTS if stem(weight) + name in tensors)
    for name in names:
        if torch.count_nonzero(tensors[name].to(torch.float32)):
            raise QCompilerError(
                f"zero points that are not zero: '{name}'",
                got="asymmetric quantization",
                need="symmetric codes, whose zero points are all zero",
                where=str(tensors.folder),
                fix="Quantize the model symmetrically.",
            )
    return names


def _check_x_scale(name: str, tensors: TensorFiles, experts: int) -> None:
    """Raises QCompilerError unless a tensor holds one positive finite number, or one per stacked expert."""
    where, dtype, shape = f"{tensors.folder}: {name}", tensors.dtype(name), tensors.shape(name)
    if dtype not in SCALE_DTYPES or dtype.itemsize == 1:
        got, need = str(dtype).removeprefix("torch."), "float32, bfloat16 or float16"
        raise QCompilerError("an activation scale has a wrong element type", got=got, need=need, where=where)
    if math.prod(shape) not in (1, experts):
        need = "one number" if experts == 1 else f"one number, or one for each of {experts} experts"
        raise QCompilerError("an activation scale has a wrong shape", got=list(shape), need=need, where=where)
    scale = tensors[name].to(torch.float32).flatten()
    if wrong := [number for number in scale.tolist() if not (math.isfinite(number) and number > 0)]:
        raise QCompilerError("this is not a valid scale", got=wrong[0], need="a positive finite number", where=where)
