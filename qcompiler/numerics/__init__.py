"""Reference quantize, dequantize, and scaled matmul in plain torch; all kernels are tested against it.

    codes, scale = numerics.quantize(x, format)      x' = numerics.dequantize(codes, scale, format=format)

A `Format` splits the last two dimensions of a tensor into blocks. Each block has one scale, which maps the largest
magnitude in the block to the largest code:

    amax  = max |x| over the block, in FP32
    scale = max(amax, floor) / format.max                  (profile "ue8m0": rounded up to a power of two)
    q     = round-to-nearest-even(clamp(x / scale))        (profile "deepgemm": x * (1 / scale))
    x'    = q * scale

A static scale is given instead of computed. A prescale multiplies each channel in FP32 before quantization. In a
symmetric format, INT8 codes range from -127 to 127, INT4 codes from -7 to 7.

Integer codes that are not symmetric use all codes, -128 to 127 or -8 to 7, for a range that includes zero:

    scale      = max(max(x, 0) / n - min(x, 0) / n, floor / 127)       n = 255; for INT4 15, and floor / 7
    zero point = clamp(round(-128 - min(x, 0) / scale))                the INT8 code of zero
    q          = clamp(round(x / scale) + zero point)
    x'         = (q - zero point) * scale

The floor avoids division by zero: a block of zeros gets zero codes and the positive scale floor / format.max. For FP8,
the floor is the one in the profile's source. FP8 codes have an exponent, so they lose no precision until amax is far
below the floor. Other codes lose precision as soon as amax is below the floor, so their floor is as small as exact
division allows.

Formats with one-byte scales, such as NVFP4 and MXFP4:

    scale = e4m3(amax / format.max / t)    t = max(amax of the tensor, floor) / (448 * format.max): `#nvfp4`
    scale = 2^(floor(log2(amax)) - e)      in E8M0; 2^e is the largest power of two among the codes: `#mxfp4`

An E4M3 scale is rounded to nearest even and saturates; with a tensor scale t, the FP32 product scale * t replaces the
scale in the formulas above. If the scale of a block is zero, its codes are zero. An E8M0 scale is at least 2^-127, and
codes saturate, as the OCP Microscaling specification (version 1.0, section 6.3) requires; with the profile "ue8m0", the
scale is rounded up instead.

NaN and infinities propagate to all values that are computed from their row:

    a computed scale of one row               the scale of the block is NaN
    a computed scale of several rows, FP8     the code of the element is NaN; the scale ignores non-finite elements
    a computed scale of several rows, others  the scale of the block is NaN, so all of its rows are NaN
    a static scale, FP8                       the code of the element is NaN
    a static scale, others                    not representable: NaN becomes 0, and infinities saturate

A tensor scale is computed from the finite elements. The sign and payload of a NaN are not specified. A code whose scale
is NaN is NaN in FP8 and 0 otherwise. A finite number never becomes NaN: outside the range of a static scale, it
saturates.

x * (1 / s) and x / s sometimes differ by an ulp, which changes about one code in two thousand; therefore these
conventions are named profiles and are never mixed. Divisions are IEEE divisions on every device.
"""

from qcompiler.ir.formats import ALL, DEFAULT_PROFILE, PROFILES, Format, Profile, profile, scale_shape
from qcompiler.numerics.codes import decode
from qcompiler.numerics.dtypes import FORMAT_MAX, format_of, torch_dtype
from qcompiler.numerics.quantizing import MOST_AT_ONCE, dequantize, quantize, quantize_static
from qcompiler.numerics.scaled_matmul import check_linear, scaled_linear, sums_integers
from qcompiler.numerics.scales import in_full, scale_of

__all__ = [
    "ALL", "DEFAULT_PROFILE", "FORMAT_MAX", "MOST_AT_ONCE", "PROFILES", "Format", "Profile", "check_linear", "decode",
    "dequantize", "format_of", "in_full", "profile", "quantize", "quantize_static", "scale_of", "scale_shape",
    "scaled_linear", "sums_integers", "torch_dtype",
]  # fmt: skip
