"""Names of other tools' formats: what each is here, or that it does not exist, and the nearest."""

import pytest

from qcompiler.errors import PassError
from qcompiler.schemes.hints import HINTS, hint, plainly
from qcompiler.schemes.named import SCHEMES, find, spec_of


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ("W8A8 w8a8", "W8A8 is 'int8_row' in INT8 and 'fp8_row' in FP8."),
        ("fp8 FP8 float8 e4m3 fp8_e4m3", "FP8 is 'fp8_tile'"),
        ("fp8_dynamic FP8-Dynamic w8a8_fp8 fp8_w8a8 rowwise fp8_per_token ptpc_fp8", "FP8 per token and output"),
        ("deepseek block_fp8 fp8_block fp8_blockwise finegrained_fp8 deepgemm fp8-block-128", "FP8 in blocks, as in "),
        ("fp8_static", "FP8 with static activation scales is 'fp8_tensor_static'"),
        ("int8 INT8 i8", "INT8 is 'int8_row'"),
        ("w8a8_int8 int8_dynamic int8_per_channel", "INT8 per token and output channel is 'int8_row'"),
        ("smoothquant SmoothQuant smooth_quant sq", "SmoothQuant is 'smoothquant_o1'"),
        ("llm.int8 llm.int8() LLM_INT8 bitsandbytes bnb", "LLM.int8, which keeps outlier columns in float"),
        ("int4 w4a16 awq gptq GPTQ-4bit nvfp4 mxfp4 fp4 nf4 bnb_4bit Q4_K_M gguf w4a8", "Formats of fewer than 8 bits"),
        ("w8a16 int8_weight_only fp8_marlin", "Weight-only formats are not supported"),
        ("mxfp8", "MXFP8, with one scale per 32 values, is not supported"),
        ("fp8_e5m2", "FP8 e5m2 is an option for the CPU only"),
        ("none bf16", "No scheme keeps the whole model in float"),
    ],
)
def test_hints(names: str, sentence: str) -> None:
    for name in names.split():
        assert hint(name).startswith(sentence), name
        with pytest.raises(PassError) as error:
            find(name)
        assert str(error.value).startswith(f"no such scheme: got '{name}'. {sentence}")
        assert str(error.value).endswith(f"Known: {', '.join(sorted(SCHEMES))}.")


def test_what_hints_name_exists() -> None:
    for _, sentence in HINTS:
        quoted = sentence.split("'")[1::2]
        assert sentence.endswith(".") and all(spec_of(name) for name in quoted)


@pytest.mark.parametrize("name", ["", "foo", "fp8_rov", "my_scheme", "my8"])
def test_other_names_have_no_hint(name: str) -> None:
    assert hint(name) == ""


@pytest.mark.parametrize("name", ["FP8-Tile", "fp8 tile", "Fp8Tile", "fp8.tile"])
def test_another_spelling_of_a_scheme(name: str) -> None:
    assert plainly(name) == plainly("fp8_tile")
    with pytest.raises(PassError, match="Did you mean 'fp8_tile'\\?"):
        find(name)
