"""Scales of merged layers and of shares on several GPUs, without vLLM."""

import re

import pytest
import torch
from torch import Tensor

from qcompiler import QCompilerError, numerics
from qcompiler.ir.formats import ALL, FP8_BLOCK, FP8_ROW, FP8_TENSOR, FP8_TILE, Format
from qcompiler.vllm.shards import Joined, blocks_in, check_loaded, check_share, join, share_of, split, spread

WIDTHS = (192, 64, 200)
DEPTH = 160


def parts(format: Format) -> list[tuple[Tensor, Tensor]]:
    """Codes and scales of matrices of different widths, whose scales differ."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for at, width in enumerate(WIDTHS):
        weight = torch.randn(width, DEPTH, generator=generator) * 3.0**at
        codes, scale = numerics.quantize(weight, format)[:2]
        found.append((codes, scale))
    return found


def linear(x: Tensor, x_format: Format, codes: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    x_q, x_s = numerics.quantize(x, x_format)[:2]
    w_format = x_format.with_block(block)
    return numerics.scaled_linear(x_q, x_s, codes, scale, None, x_format=x_format, w_format=w_format)


@pytest.mark.parametrize(
    ("x_format", "format", "kept"),
    [
        (FP8_TILE, FP8_BLOCK, ((0, 192), (256, 320), (384, 584))),
        (FP8_ROW, FP8_ROW, None),
        (FP8_TENSOR, FP8_TENSOR, None),
    ],
)  # fmt: skip
def test_one_matmul_gives_the_bits_of_all_parts(
    x_format: Format, format: Format, kept: tuple[tuple[int, int], ...] | None
) -> None:
    x = torch.randn(5, DEPTH)
    pairs = parts(format)
    want = torch.cat([linear(x, x_format, codes, scale, format.block) for codes, scale in pairs], -1)
    codes, scale = (torch.cat(each) for each in zip(*pairs, strict=True))
    joined = join(codes, scale, WIDTHS, format.block)
    assert joined.kept == kept
    assert [*joined.scale.shape] == numerics.scale_shape(joined.codes.shape, joined.block)
    got = linear(x, x_format, joined.codes, joined.scale, joined.block)
    got = got if kept is None else torch.cat([got[:, start:end] for start, end in kept], -1)
    assert torch.equal(got, want)


@pytest.mark.parametrize("widths", [(256, 128, 100), (100,)])
def test_blocks_that_are_regular_already_stay(widths: tuple[int, ...]) -> None:
    codes, scale = torch.zeros(sum(widths), 8), torch.ones(sum(blocks_in(width, 128) for width in widths), 1)
    joined = join(codes, scale, widths, (128, 128))
    assert joined.codes is codes and joined.scale is scale and joined.kept is None


def test_shares_of_a_scale() -> None:
    scale = torch.arange(24.0).reshape(6, 4)
    assert torch.equal(share_of(scale, 3, 1, 4, 1), scale[3:])  # by rows: all columns
    assert torch.equal(share_of(scale, 6, 1, 2, 1), scale[:, 2:])  # by columns: all rows
    assert torch.equal(share_of(scale[:, :1], 3, 1, 1, 1), scale[3:, :1])  # a scale for each row
    assert torch.equal(share_of(scale[:1, :1], 1, 3, 1, 3), scale[:1, :1])  # one scale
    with pytest.raises(
        QCompilerError, match=r"a scale does not fit the layer .*: got \[6, 4\]; need at least \[8, 4\]"
    ):
        share_of(scale, 4, 1, 4, 0)


@pytest.mark.parametrize(
    ("share", "whole", "block"), [(256, 512, 128), (192, 192, 128), (96, 192, 1), (96, 192, ALL)]
)  # fmt: skip
def test_shares_that_begin_at_blocks(share: int, whole: int, block: int) -> None:
    check_share("layers.0.q_proj", "output", share, whole, block)


def test_a_share_that_begins_inside_a_block_is_one_sentence() -> None:
    message = (
        "tensor parallelism would cut 'layers.0.mlp.down_proj' inside a block: got 768 of 1536 input channels on each "
        "GPU; need a multiple of 512. Use fewer GPUs, or a scheme without blocks for these layers: "
        'overrides={"*.down_proj": "fp8_row"}.'
    )
    with pytest.raises(QCompilerError, match=f"^{re.escape(message)}$"):
        check_share("layers.0.mlp.down_proj", "input", 768, 1536, 512)


def test_a_layer_that_is_merged_in_the_files() -> None:
    scale = torch.arange(7.0).reshape(7, 1)
    assert [len(part) for part in split("qkv_proj", scale, (512, 128, 200), 128)] == [4, 1, 2]
    assert [len(part) for part in split("qkv_proj", scale, (4, 2, 1), 1)] == [4, 2, 1]
    assert all(torch.equal(part, scale[:1]) for part in split("qkv_proj", scale[:1], (4, 2), ALL))
    with pytest.raises(
        QCompilerError, match=r"the parts of 'a\.qkv_proj', which is one matrix .*: got parts of 192, 64"
    ):
        split("a.qkv_proj", scale, (192, 64, 64), 128)


def test_a_missing_scale_is_refused() -> None:
    check_loaded("a.weight_scale", torch.ones(2, 1))
    with pytest.raises(QCompilerError, match=r"the files lack a scale, or it is not a number: got 'a\.input_scale'"):
        check_loaded("a.input_scale", torch.tensor([[1.0], [torch.nan]]))


def test_a_bias_follows_its_columns() -> None:
    bias = torch.arange(1.0, 6.0)
    codes, scale = torch.zeros(8, 4), torch.ones(2, 1)
    assert spread(bias, Joined(codes, scale, (4, 4))) is bias
    wide = spread(bias, Joined(codes, scale, (4, 4), ((0, 3), (4, 6))))
    assert wide.tolist() == [1, 2, 3, 0, 4, 5, 0, 0]
