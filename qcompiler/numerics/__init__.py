"""What quantize, dequantize and the scaled product mean, in plain torch: the truth that every kernel is held to.

    codes, scale = numerics.quantize(x, format)      x' = numerics.dequantize(codes, scale, format=format)

A `Format` cuts a tensor into blocks over its last two dimensions. Each block has one scale, so that the largest element
of the block lands on the largest code:

    amax  = max |x| over the block, in FP32
    scale = max(amax, floor) / format.max                  (profile "ue8m0": rounded up to a power of two)
    q     = round-to-nearest-even(clamp(x / scale))        (profile "deepgemm": x * (1 / scale))
    x'    = q * scale

A static scale is given instead of computed. A prescale multiplies each channel, in FP32, before anything else happens
to it. Formats are symmetric: INT8 codes go from -127 to 127, INT4 codes from -7 to 7.

The floor keeps a block of zeros from dividing by zero: it gets zeros and the positive scale floor / format.max. For FP8
it is the one that the source of the profile uses. FP8 codes have an exponent, so they lose nothing until an amax is far
below the floor. The other codes lose bits from the floor on, so their floor is not a size of data: it is as small as
exact division allows.

Scales of one byte, as the 4-bit formats of the field have them:

    scale = e4m3(amax / format.max / t)    t = max(amax of the tensor, floor) / (448 * format.max): `#nvfp4`
    scale = 2^(floor(log2(amax)) - e)      in E8M0; 2^e is the largest power of two among the codes: `#mxfp4`

A scale in E4M3 is rounded to nearest even and saturates; with a tensor scale t, the FP32 product of both takes the
place of the scale in the formulas above. A block whose scale is zero holds zeros. A scale in E8M0 is at least 2^-127,
and codes beyond the largest one saturate, as the OCP Microscaling specification (version 1.0, section 6.3) asks; with
the profile "ue8m0" it is rounded up instead.

A NaN or an infinity reaches everything that is computed from its row:

    a computed scale of one row               the scale of the block is NaN
    a computed scale of several rows, FP8     the code of the element is NaN; the scale is that of the finite elements
    a computed scale of several rows, others  the scale of the block is NaN, which poisons all of its rows
    a static scale, FP8                       the code of the element is NaN
    a static scale, others                    nothing can say it: NaN becomes 0, and infinities saturate

A tensor scale is that of the finite elements. The sign and payload of a NaN are not specified. A code whose scale is
NaN is NaN in FP8 and 0 elsewhere. A finite number never becomes NaN: beyond the range of a static scale it saturates.

The rounding of 1/s and of x/s differ by an ulp here and there, which flips about one code in two thousand; hence
the conventions of the field are named profiles and are never mixed. Divisions are IEEE divisions on every device.
"""

from qcompiler.ir.formats import ALL, DEFAULT_PROFILE, PROFILES, Format, Profile, profile, scale_shape
from qcompiler.numerics.codes import decode
from qcompiler.numerics.dtypes import FORMAT_MAX, format_of, torch_dtype
from qcompiler.numerics.products import check_linear, scaled_linear, sums_integers
from qcompiler.numerics.quantizing import MOST_AT_ONCE, dequantize, quantize, quantize_static
from qcompiler.numerics.scales import in_full, scale_of

__all__ = [
    "ALL", "DEFAULT_PROFILE", "FORMAT_MAX", "MOST_AT_ONCE", "PROFILES", "Format", "Profile", "check_linear", "decode",
    "dequantize", "format_of", "in_full", "profile", "quantize", "quantize_static", "scale_of", "scale_shape",
    "scaled_linear", "sums_integers", "torch_dtype",
]  # fmt: skip
