"""The KV cache kernels compiled for Hopper without a GPU: tensor-core instructions, wide loads, no spills."""

import pytest
import torch
from hopper_kernels import (
    attend_calls,
    choose_attend,
    compile_append,
    compile_attend,
    compile_combine,
    compile_read,
)

from codegen.machine_code import MachineCode
from codegen.targets.hopper import HOPPER

E4M3, I8, B16, F16, F32 = torch.float8_e4m3fn, torch.int8, torch.bfloat16, torch.float16, torch.float32


def assert_fits(code: MachineCode, blocks: int = 1) -> None:
    assert (code.local_loads, code.local_stores) == (0, 0), "registers were spilled to local memory"
    assert code.shared_memory <= HOPPER.limits.shared_memory
    assert HOPPER.limits.blocks_at_once(code.registers, code.warps, code.shared_memory) >= blocks


@pytest.mark.parametrize("dtype", [E4M3, I8, B16, F16])
def test_decoding(dtype: torch.dtype) -> None:
    code = compile_attend(dtype)
    assert_fits(code, blocks=2 if dtype.itemsize == 1 else 3)  # one program waits for memory while others multiply
    assert "HMMA.16816.F32" in code.sass and code.wide_loads >= 8


@pytest.mark.parametrize("dtype", [E4M3, I8, B16])
def test_a_chunk_of_tokens_uses_the_wide_instruction(dtype: torch.dtype) -> None:
    code = compile_attend(dtype, batch=1, tokens=512)
    assert_fits(code)
    assert "HGMMA.64x" in code.sass


@pytest.mark.parametrize("sizes", [(64, 64), (80, 80), (96, 96), (192, 128), (256, 256), (576, 512)])
@pytest.mark.parametrize("dtype", [E4M3, B16])
def test_other_head_sizes(dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    assert_fits(compile_attend(dtype, sizes=sizes, window=4096, sinks=True))


LATENT = {"groups": 1, "repeats": 128, "sizes": (576, 512), "within": True}


@pytest.mark.parametrize("dtype", [E4M3, I8, B16, F16])
@pytest.mark.parametrize("tokens", [1, 512])
def test_values_within_the_keys_are_read_once(dtype: torch.dtype, tokens: int) -> None:
    code = compile_attend(dtype, tokens=tokens, **LATENT)
    assert_fits(code)
    assert "HGMMA.64x256x16.F32" in code.sass and code.wide_loads >= 36


@pytest.mark.parametrize("dtype", [E4M3, B16, F32])
def test_other_latents(dtype: torch.dtype) -> None:
    for repeats, sizes in ((16, (576, 512)), (16, (320, 256)), (4, (20, 16))):
        assert_fits(compile_attend(dtype, **{**LATENT, "repeats": repeats, "sizes": sizes}))
    if dtype == E4M3:
        assert_fits(compile_attend(dtype, static=True, **LATENT))
        assert_fits(compile_append(dtype, sizes=(576, 512), within=True))
    assert_fits(compile_combine(1, **LATENT))


def test_fp32_and_limits_of_scores() -> None:
    assert_fits(compile_attend(F32))
    assert_fits(compile_attend(E4M3, tokens=8))  # 32 rows
    for code in (compile_attend(B16, softcap=50.0), compile_attend(B16, softcap=30.0, window=4096, repeats=2)):
        assert_fits(code, blocks=3)


@pytest.mark.parametrize("dtype", [E4M3, B16])
def test_slopes_and_chunks(dtype: torch.dtype) -> None:
    decoding = compile_attend(dtype, slopes=True), compile_attend(dtype, chunk=8192)
    for code in decoding:
        assert_fits(code, blocks=2)
        assert "HMMA.16816.F32" in code.sass and code.wide_loads >= 8
    chunk = compile_attend(dtype, batch=1, tokens=512, slopes=True, chunk=8192)
    assert_fits(chunk)
    assert "HGMMA.64x" in chunk.sass


@pytest.mark.parametrize("dtype", [E4M3, I8])
def test_static_scales(dtype: torch.dtype) -> None:
    decoding, chunk = compile_attend(dtype, static=True), compile_attend(dtype, batch=1, tokens=512, static=True)
    assert_fits(decoding, blocks=2)
    assert_fits(chunk)
    assert "HMMA.16816.F32" in decoding.sass and "HGMMA.64x" in chunk.sass
    append = compile_append(dtype, static=True)
    assert_fits(append)
    assert ("F2FP.SATFINITE.E4M3" in append.sass) == (dtype == E4M3)


@pytest.mark.parametrize("dtype", [E4M3, B16])
def test_rings(dtype: torch.dtype) -> None:
    """Decoding, a chunk and an append as with all positions: as many wide loads, no spills."""
    for tokens in (1, 512):
        ring, full = (compile_attend(dtype, tokens=tokens, window=1024, ring=held) for held in (3072, None))
        assert_fits(ring)
        assert ring.wide_loads == full.wide_loads and ("HGMMA.64x" in ring.sass) == (tokens > 1)
        append = compile_append(dtype, tokens=tokens, ring=3072)
        assert_fits(append)
        assert append.wide_loads >= 2


def test_splits_are_added_in_registers() -> None:
    for batch in (1, 4, 16):
        code = compile_combine(batch)
        assert_fits(code)
        assert code.wide_loads >= 1


def test_the_kernel_that_writes_the_result_quantizes_it() -> None:
    alone = compile_attend(E4M3, batch=64, tile=128)
    assert_fits(alone, blocks=2)
    assert_fits(compile_attend(B16, batch=64, tile=128), blocks=3)
    assert_fits(compile_attend(E4M3, batch=1, tokens=512, tile=64))
    for code in (alone, compile_combine(1, tile=128), compile_combine(1, sizes=(64, 64), tile=128)):
        assert_fits(code)
        assert "F2FP.SATFINITE.E4M3" in code.sass
    assert "F2FP.SATFINITE.E4M3" not in compile_attend(E4M3, batch=1, tile=128).sass, "another kernel adds the splits"


def test_heads_that_share_a_tile_are_quantized_by_their_own_kernel() -> None:
    def names(**rest: object) -> list[str]:
        return [call.kernel.__name__ for call in attend_calls(sizes=(64, 64), **rest)]  # type: ignore[arg-type]

    assert names(batch=64, tile=128) == ["attend_to_cache", "quantize_tiles"]
    assert names(batch=64, tile=64) == ["attend_to_cache"]
    assert names(batch=1, tile=128) == ["attend_to_cache", "combine_splits"]


@pytest.mark.parametrize("dtype", [E4M3, I8, B16])
@pytest.mark.parametrize("tokens", [1, 512])
def test_appending(dtype: torch.dtype, tokens: int) -> None:
    code = compile_append(dtype, tokens=tokens)
    assert_fits(code)
    assert code.wide_loads >= 2, "loads have to be 16 bytes wide"
    assert ("F2FP.SATFINITE.E4M3" in code.sass) == (dtype == E4M3)


def test_appending_other_head_sizes() -> None:
    for sizes in ((96, 96), (192, 128), (576, 512)):
        assert_fits(compile_append(E4M3, sizes=sizes))


@pytest.mark.parametrize("dtype", [E4M3, I8, B16])
def test_reading(dtype: torch.dtype) -> None:
    code = compile_read(dtype)
    assert_fits(code, blocks=3)
    assert code.wide_loads >= 2 and code.wide_stores >= 4, "accesses have to be 16 bytes wide"
    assert_fits(compile_read(dtype, sizes=(192, 128)))


def test_the_number_of_splits_fills_the_device() -> None:
    programs = {batch: batch * 8 * choose_attend(batch).splits for batch in (1, 2, 4, 16, 64, 256)}
    assert all(132 < count <= 2 * 132 or batch == 1 for batch, count in programs.items() if batch <= 16)
    assert choose_attend(64).splits == choose_attend(256).splits == 1
    assert choose_attend(64, capacity=32768).splits == 4  # a split has at most 8192 positions
    assert choose_attend(1).splits == 33
    assert choose_attend(1, capacity=2048).splits == 16  # no split has fewer than 128 positions
    assert choose_attend(1, window=1000).splits == 8
    assert choose_attend(1, 512).splits == 1 and choose_attend(1, 512).block_m == 64
