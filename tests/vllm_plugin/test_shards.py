"""Scales of merged layers and of shares on several GPUs, without vLLM."""

import pytest
import torch
from exact_sums import integers
from torch import Tensor

from qcompiler import QCompilerError, numerics
from qcompiler.checkpoints.layer_schemes import LayerSchemes
from qcompiler.ir.formats import ALL, FP8_BLOCK, FP8_ROW, FP8_TENSOR, FP8_TILE, Format
from qcompiler.vllm.cuts import Split, check_cuts
from qcompiler.vllm.shards import Joined, Share, blocks_in, check_loaded, cut_error, join, share_of, split, spread

WIDTHS = (192, 64, 200)
DEPTH = 160


def parts(format: Format) -> list[tuple[Tensor, Tensor]]:
    """Codes and scales of matrices of different widths, whose scales differ."""
    found = []
    for at, width in enumerate(WIDTHS):
        weight = integers(width, DEPTH, at) * 4.0**at
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
    x = integers(5, DEPTH, 9)
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
    ("size", "whole", "block", "is_cut"),
    [(256, 512, 128, False), (192, 192, 128, False), (96, 192, 1, False), (96, 192, ALL, False), (192, 384, 128, True)],
)  # fmt: skip
def test_shares_that_begin_at_blocks(size: int, whole: int, block: int, is_cut: bool) -> None:
    assert Share("layers.0.q_proj", "output", size, whole, block).is_cut is is_cut


def test_a_share_that_begins_inside_a_block_is_one_sentence() -> None:
    message = (
        "tensor parallelism would cut 'layers.0.mlp.down_proj' inside a block: got 192 of 1536 input channels on each "
        "GPU; need a multiple of 128. Use fewer GPUs, or a scheme without blocks for these layers: "
        'overrides={"*.down_proj": "fp8_row"}.'
    )
    share = Share("layers.0.mlp.down_proj", "input", 192, 1536, 128)
    assert str(cut_error(share, ["layers.0.mlp.down_proj", "layers.1.mlp.down_proj"])) == message


LAYERS = {
    "model.layers.0.self_attn.q_proj": (576, 576), "model.layers.0.self_attn.k_proj": (192, 576),
    "model.layers.0.self_attn.o_proj": (576, 576), "model.layers.0.mlp.down_proj": (576, 1536),
}  # fmt: skip
STYLES = {
    "layers.*.self_attn.q_proj": "colwise", "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise", "layers.*.mlp.down_proj": "rowwise",
}  # fmt: skip


def test_layers_that_the_files_cannot_be_cut_into() -> None:
    tiles, rows = LayerSchemes("fp8_tile"), LayerSchemes("fp8_row")
    message = (
        r"would cut 'model\.layers\.0\.self_attn\.q_proj' inside a block: got 192 of 576 output channels .* "
        r'overrides=\{"\*\.q_proj": "fp8_row", "\*\.k_proj": "fp8_row", "\*\.v_proj": "fp8_row", '
        r'"\*\.o_proj": "fp8_row"\}'
    )
    with pytest.raises(QCompilerError, match=message):
        check_cuts(LAYERS, tiles, Split(3, STYLES, heads=3, head_size=64))
    check_cuts(LAYERS, rows, Split(3, STYLES, heads=3, head_size=64))
    check_cuts(LAYERS, tiles, Split(3, {}, heads=3, head_size=64))
    in_float = LayerSchemes("fp8_tile", dict.fromkeys(LAYERS) | {"model.layers.0.mlp.down_proj": "fp8_tile"})
    check_cuts(LAYERS, in_float, Split(3, STYLES, heads=3, head_size=64))  # 512 of 1536
    gathered = {pattern: f"{style}_gather_output" for pattern, style in STYLES.items()}
    check_cuts(LAYERS, tiles, Split(3, gathered, heads=3, head_size=64))


def test_few_key_heads_are_held_by_several_gpus() -> None:
    shapes, styles = {"layers.0.k_proj": (256, 512)}, {"layers.*.k_proj": "colwise"}
    check_cuts(shapes, LayerSchemes("fp8_tile"), Split(4, styles, heads=2, head_size=128))
    with pytest.raises(QCompilerError, match=r"got 64 of 256 output channels"):
        check_cuts(shapes, LayerSchemes("fp8_tile"), Split(4, styles, heads=4, head_size=64))


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
