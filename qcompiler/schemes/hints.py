"""Hints for names of quantization formats in other tools.

hint("W8A8")    ->    "W8A8 is 'int8_row' in INT8 and 'fp8_row' in FP8."
hint("awq")     ->    "4-bit formats are not supported: ..."
"""

import re

SEPARATORS = re.compile(r"[\W_]+")

FP8 = "(fp8|float8|f8|f8e4m3(fn)?|fp8e4m3(fn)?|float8e4m3(fn)?|e4m3(fn)?)"
INT8 = "(int8|i8|8bit)"
PER_ROW = "(per)?(rowwise|row|token|channel|channelwise|pertokenperchannel|dynamic|dynamicpertoken)"
PER_TENSOR = "(per)?(tensorwise|tensor)(dynamic)?"
W8A8 = "(w8a8)?"

HINTS = tuple(
    (re.compile(pattern), sentence)
    for pattern, sentence in (
        (f"{FP8}?({INT8}|w8)?(a16|weightonly|wo|marlin)|w8a16.*|{FP8}w8a16|{INT8}w8a16",
         "Weight-only formats are not supported: every scheme quantizes weights and activations to 8 bits. The "
         "closest schemes are 'fp8_row' and 'int8_row'."),
        (".*(int4|uint4|fp4|nf4|4bit|w4a4|w4a8|w4a16|w4afp8|w4|w[1235678]a4|int2|int3|w2a16|w3a16).*"
         "|awq.*|gptq.*|autoround|gguf.*|q[2-8](k[sml]?|[01])?|exl[23]|hqq|aqlm|quip.*|bitnet.*|marlin",
         "Formats of fewer than 8 bits are not supported: every scheme quantizes weights and activations to 8 bits. "
         "The closest schemes are 'fp8_tile' and 'int8_row'."),
        ("mxfp8.*|mx8|mx",
         "MXFP8, with one scale per 32 values, is not supported. The closest scheme is "
         "'fp8_tile{scale=ue8m0}', with power-of-two scales for tiles of 128 and blocks of 128 x 128."),
        ("mxfp6|fp6|w6a6|int6|mxint8",
         "This format is not supported; schemes use FP8 or INT8. The closest schemes are 'fp8_tile' and 'int8_row'."),
        (f"llm{INT8}|bitsandbytes({INT8})?|bnb({INT8})?|loadin8bit",
         "LLM.int8, which keeps outlier columns in float, is not supported. The closest scheme is 'int8_row'; "
         "'smoothquant_o1' handles outliers."),
        ("smoothquant|smooth|sq|smoothquantint8|int8smoothquant|int8sq|w8a8sq",
         "SmoothQuant is 'smoothquant_o1' (per token), 'smoothquant_o2' (per tensor), 'smoothquant_o3' (per tensor, "
         "static) and 'smoothquant_fp8'."),
        ("smoothquantfp8|fp8smoothquant|fp8smooth",
         "SmoothQuant in FP8 is 'smoothquant_fp8', or 'fp8_tile_smooth' in tiles."),
        (f"deepseek(v?3|v?31|v?32|r1|fp8)?|deepgemm|{FP8}?(fine|finegrained)({FP8}|quant)?|{FP8}?(per)?(block|blocks|"
         f"blockwise|tile|tiles|tilewise|groupwise|128x128|block128|128128)(128)?{FP8}?{W8A8}|w8a8block({FP8})?|w8a8{FP8}block|blockscale.*",
         "FP8 in blocks, as in DeepSeek-V3, is 'fp8_tile'."),
        (f"{FP8}?static({FP8}|tensor|pertensor)?|w8a8{FP8}static|{FP8}static{W8A8}",
         "FP8 with static activation scales is 'fp8_tensor_static'; it needs calibration data."),
        (f"{INT8}static.*|w8a8{INT8}?static|static{INT8}",
         "INT8 with static activation scales is 'int8_tensor_static'; it needs calibration data."),
        (f"{FP8}?e5m2(fn)?|f8e5m2|{FP8}e5m2|float8e5m2",
         "FP8 e5m2 is an option for the CPU only: 'fp8_row{dtype=f8e5m2}'."),
        (f"{INT8}{PER_TENSOR}|w8a8{INT8}{PER_TENSOR}", "INT8 with one scale per tensor is 'int8_tensor'."),
        (f"{INT8}{PER_ROW}.*|w8a8{INT8}|{INT8}w8a8|{INT8}dynamic.*",
         "INT8 per token and output channel is 'int8_row'."),
        (f"ptpc({FP8})?|fbgemm{FP8}|{FP8}ptpc|{FP8}?{PER_ROW}({FP8})?{W8A8}|w8a8{FP8}(dynamic)?|{FP8}w8a8(dynamic)?|"
         f"{FP8}dynamicactivation.*",
         "FP8 per token and output channel is 'fp8_row'."),
        (f"{FP8}?{PER_TENSOR}", "FP8 with one scale per tensor is 'fp8_tensor'."),
        (FP8, "FP8 is 'fp8_tile' (tiles and blocks of 128, the default), 'fp8_row' (per token and output channel) or "
         "'fp8_tensor'."),
        (f"{INT8}|q8|quint8|qint8|torchao|ptq|dynamic(quant.*)?",
         "INT8 is 'int8_row' (per token and output channel) or 'int8_tensor'."),
        ("w8a8|8bits?|compressedtensors",
         "W8A8 is 'int8_row' in INT8 and 'fp8_row' in FP8."),
        ("none|no|off|float|fp16|bf16|float16|bfloat16|fp32|float32",
         "No scheme keeps the whole model in float: use the original model, or ignore=[...] for some layers."),
    )
)  # fmt: skip
"""Patterns for names in lower case without separators; the first full match wins."""


def hint(name: str) -> str:
    """The hint for a name from another tool; empty for an unknown name."""
    plain = plainly(name)
    return next((sentence for pattern, sentence in HINTS if pattern.fullmatch(plain)), "")


def plainly(name: str) -> str:
    """A name in lower case without separators, to recognize spellings such as `FP8-Tile`."""
    return SEPARATORS.sub("", name).lower()
