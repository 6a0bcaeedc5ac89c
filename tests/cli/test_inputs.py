"""Calls of a model as a command line gives them: random tensors by type, and tensors in files."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from qcompiler.cli.inputs import SPEC, calls_in, example_in, lines_of, random_call
from qcompiler.errors import InputError
from qcompiler.ir import DType, TensorType
from qcompiler.numerics.dtypes import torch_dtype

DRAWN = [
    dtype for dtype in DType if dtype not in (DType.f8e8m0fnu, DType.u64, DType.u32, DType.u16) and dtype.bits >= 8
]


@given(st.sampled_from(DRAWN), st.lists(st.integers(0, 4), max_size=3), st.booleans())
def test_a_type_as_the_ir_prints_it_describes_an_input(dtype: DType, shape: list[int], spaced: bool) -> None:
    spelled = str(TensorType(dtype, tuple(shape)))
    call = random_call([f"x={spelled}" if not spaced else f" x = {spelled} "])
    assert call.args == () and [*call.kwargs] == ["x"]
    assert str(TensorType.of(call.kwargs["x"])) == spelled
    assert call.kwargs["x"].dtype == torch_dtype(dtype)


@given(st.integers(-100, 100), st.integers(0, 50))
def test_integers_lie_between_the_ends(low: int, more: int) -> None:
    values = random_call([f"ids=i64[40] in {low}..{low + more}"]).kwargs["ids"]
    assert int(values.min()) >= low and int(values.max()) <= low + more


def test_integers_are_0_and_1_by_themselves_and_both_ends_are_reached() -> None:
    assert set(random_call(["ids=i64[200]"]).kwargs["ids"].tolist()) == {0, 1}
    assert set(random_call(["ids=int32[400] in 5..7"]).kwargs["ids"].tolist()) == {5, 6, 7}


def test_the_same_command_gives_the_same_numbers() -> None:
    one, two = (random_call(["x=bf16[64]", "1=f32[4]", "0=f32[3]"]) for _ in range(2))
    assert torch.equal(one.kwargs["x"], two.kwargs["x"])
    assert [len(value) for value in one.args] == [3, 4]


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["x"], "an input description is malformed: got 'x'; need NAME=TYPE"),
        (["x=f32[2, y]"], "an input description is malformed"),
        (["x=f33[2]"], "an input description has an unknown element type: got 'f33'; need f64, f32, "),
        (["x=f32[2]", "x=f32[3]"], "an input is described twice: got 'x'"),
        (["x=f32[2] in 0..3"], "an input description has an invalid range: got 'x=f32[2] in 0..3'"),
        (["x=i64[2] in 4..3"], "an input description has an invalid range"),
        (["1=f32[2]"], r"a position is missing: got [1]; need [0] (in the inputs)"),
    ],
)
def test_what_is_wrong_with_a_description(specs: list[str], message: str) -> None:
    with pytest.raises(InputError) as error:
        random_call(specs)
    assert str(error.value).startswith(message)


def test_the_form_is_what_the_page_says() -> None:
    assert SPEC.fullmatch("input_ids=i64[2,16] in 0..30521") and SPEC.fullmatch("0=f32[4,256]")


# Files


def saved(path: Path, *names: str) -> str:
    save_file({name: torch.full((2,), float(index)) for index, name in enumerate(names)}, path)
    return str(path)


def test_a_file_is_one_call_by_name_or_position(tmp_path: Path) -> None:
    call = example_in(saved(tmp_path / "a.safetensors", "0", "mask", "1"))
    assert [float(value[0]) for value in call.args] == [0.0, 2.0]
    assert float(call.kwargs["mask"][0]) == 1.0


def test_a_file_is_several_calls_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    calls = calls_in(saved(tmp_path / "a.safetensors", "10.x", "9.x", "9.y"))
    assert [[*call.kwargs] for call in calls] == [["x", "y"], ["x"]]
    assert float(calls[1].kwargs["x"][0]) == 0.0


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("0.x", "y"), "tensor names in the file mix two forms: got 'y'; need only argument names"),
        (("model.x",), "tensor names in the file mix two forms: got 'model.x'"),
        (("0", "2"), "a position is missing: got [0, 2]; need [0, 1]"),
    ],
)
def test_a_file_of_another_form(names: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        calls_in(saved(tmp_path / "a.safetensors", *names))
    assert str(error.value).startswith(message)


def test_files_that_do_not_do(tmp_path: Path) -> None:
    several = saved(tmp_path / "a.safetensors", "0.x", "1.x")
    with pytest.raises(InputError, match=r"the example has several calls: got 2 in .*a.safetensors; need one"):
        example_in(several)
    (tmp_path / "b.safetensors").write_text("nothing of the kind")
    for name in ("b.safetensors", "c.safetensors"):
        with pytest.raises(InputError, match=rf"tensors cannot be read: got .*{name}: .*; need a .safetensors file"):
            calls_in(str(tmp_path / name))
    mixed = example_in(saved(tmp_path / "d.safetensors", "0", "x"))
    with pytest.raises(InputError, match=r"some arguments by name and others by position: .* \(in there\)"):
        mixed.as_batch("there")


def test_lines_of_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one\n\n  two  \n")
    assert lines_of(str(path)) == ["one", "two"]
    path.write_text("\n \n")
    with pytest.raises(InputError, match="the calibration text is empty"):
        lines_of(str(path))
    with pytest.raises(InputError, match="the calibration text cannot be read"):
        lines_of(str(tmp_path / "none.txt"))
