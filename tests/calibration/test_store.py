"""Calibration of graphs: observed values, errors without usable data, the table, and the file."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from qcompiler.calibration import Calibration, Statistics
from qcompiler.calibration.store import _low_of
from qcompiler.errors import InputError, QCompilerError
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph, Op

TEXT = """
func @m(%x: bf16[s0, s1, 8], %n: int(s2)) -> (f32[s0, s1, 4]) where s0 in 0.., s1 in 0.., s2 in 0.. {
  %w = core.param() {name = "w"} : bf16[8, 8]
  %h = aten.linear(%x, %w) : bf16[s0, s1, 8] loc("m.py":3 in "up")
  %wide = aten._to_copy(%h) {dtype = f32} : f32[s0, s1, 8]
  %log = aten.log(%wide) : f32[s0, s1, 8] loc("m.py":4 in "act")
  %a, %b = aten.split.Tensor(%h, 4, -1) : bf16[s0, s1, 4], bf16[s0, s1, 4] loc("m.py":5 in "act")
  %y = aten._to_copy(%b) {dtype = f32} : f32[s0, s1, 4]
  return %y
}
"""


def model() -> Graph:
    graph = Graph.parse(TEXT)
    graph.weights = {"w": torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)}
    return graph


def data(*shapes: tuple[int, int]) -> list[list[Any]]:
    rng = torch.Generator().manual_seed(1)
    return [[torch.randn(*shape, 8, generator=rng).to(torch.bfloat16), 1] for shape in shapes]


def values_of(graph: Graph, batches: list[list[Any]], name: str) -> list[Tensor]:
    """The value in each batch, from runs of the graph that keep everything."""
    found: list[Tensor] = []

    def keep(op: Op, results: tuple[Any, ...]) -> None:
        found.extend(out for value, out in zip(op.results, results, strict=True) if value.name == name)

    for batch in batches:
        interpret(graph, batch, observe=keep)
    return found


def equal(a: Calibration, b: Calibration) -> bool:
    return a.digest == b.digest and list(a.statistics) == list(b.statistics)


# Observing


def test_any_values_are_observed_in_one_run() -> None:
    graph, batches = model(), data((2, 3), (0, 3), (1, 5))
    read = []

    class Counted(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            read.append(1)
            return super().__iter__()

    calibration = Calibration(Counted(batches))
    calibration.observe(graph, ["x", "a", "%b", "h", "%a"], histogram=True, rows=4)
    assert len(read) == 1 and list(calibration.statistics) == ["x", "a", "b", "h"]
    for name in ("a", "b", "h"):
        want = Statistics.empty(8 if name == "h" else 4, histogram=True, rows=4)
        for value in values_of(graph, batches, name):
            want.update(value)
        mine, theirs = Calibration(), Calibration()
        mine.statistics["v"], theirs.statistics["v"] = calibration.statistics[name], want
        assert equal(mine, theirs)
    whole = torch.cat([batch[0].reshape(-1, 8) for batch in batches]).float()
    assert torch.equal(calibration.statistics["x"].amax("absmax", "channel"), whole.abs().amax(0))
    assert calibration.statistics["x"].rows == 11 and calibration.statistics["x"].batches == 3


def test_observing_more_keeps_what_is_known() -> None:
    graph = model()
    calibration = Calibration(data((2, 3)))
    calibration.observe(graph, ["h"])
    h = calibration.statistics["h"]
    calibration.observe(graph, ["a"], rows=2)
    assert calibration.statistics["h"] is h and calibration.statistics["a"].sample is not None
    calibration.observe(graph, ["h"])
    assert calibration.statistics["h"] is not h and calibration.statistics["h"].rows == 6
    calibration.observe(graph, [])


def test_an_iterator_is_read_once() -> None:
    graph = model()
    calibration = Calibration(iter(data((2, 3), (1, 1))))
    calibration.observe(graph, ["h"])
    assert calibration.statistics["h"].rows == 7
    with pytest.raises(InputError) as error:
        calibration.observe(graph, ["a"])
    assert str(error.value) == (
        "the calibration batches were an iterator, which has already been consumed. Pass a list, "
        "which can be read again."
    )
    assert list(calibration.statistics) == ["h"]


NAN = [torch.full((1, 2, 8), math.nan, dtype=torch.bfloat16), 1]


@pytest.mark.parametrize(
    ("batches", "names", "message"),
    [
        (None, ["h"], "there is no calibration data. Give it: Calibration(batches)."),
        ([], ["h"], "there is no calibration data: got no batches; need at least one batch"),
        (iter([]), ["h"], "there is no calibration data: got no batches; need at least one batch"),
        (
            [*data((1, 1)), [torch.ones(1, 1, 8)]], ["h"],
            "the graph does not accept a calibration batch: got batches[1]: @m takes 2 inputs: got 1; need 2",
        ),
        (
            [[torch.ones(1, 1, 7, dtype=torch.bfloat16), 1]], ["h"],
            "the graph does not accept a calibration batch: got batches[0]: aten.linear failed: ",
        ),
        (
            [[torch.ones(1, 1, 7, dtype=torch.bfloat16), 1]], ["x"],
            "the graph does not accept a calibration batch: got batches[0]: the batch does not fit the statistics: got "
            "bf16[1, 1, 7]; need floating point, with 8 channels",
        ),
        (
            [torch.ones(2, 8)], ["h"],
            "a calibration batch has the wrong type: got Tensor; need a list of the 2 inputs of the graph (in batch",
        ),
        ([{"x": 1}], ["h"], "a calibration batch has the wrong type: got dict; need a list of the 2 inputs"),
        (
            [*data((1, 1)), NAN], ["a", "x"],
            "calibration found numbers in %x that are not finite: got 16 NaN and 0 Inf in batches[1]; need finite "
            "numbers (in core.input). Look for the cause in this batch, or in the model itself.",
        ),
        (
            [[torch.zeros(1, 2, 8, dtype=torch.bfloat16), 1]], ["log"],
            "calibration found numbers in %log that are not finite: got 0 NaN and 16 Inf in batches[0]; need finite "
            'numbers (in aten.log loc("m.py":4 in "act")). Look for the cause',
        ),
        (data((1, 1)), ["n"], "%n cannot be observed: got int(s2); need floating point, with a last axis of fixed"),
        (data((1, 1)), ["hh"], "there is no value %hh. Did you mean '%h'?"),
    ],
)  # fmt: skip
def test_what_cannot_be_observed(batches: Any, names: list[str], message: str) -> None:
    graph = model()
    calibration = Calibration(batches)
    calibration.statistics["old"] = Statistics.empty(1)
    with pytest.raises(QCompilerError) as error:
        calibration.observe(graph, names)
    assert str(error.value).startswith(message)
    assert isinstance(error.value, InputError) or names == ["hh"]
    assert list(calibration.statistics) == ["old"]


def test_the_cause_is_kept() -> None:
    with pytest.raises(InputError) as error:
        Calibration([[torch.ones(1, 1, 7, dtype=torch.bfloat16), 1]]).observe(model(), ["h"])
    assert isinstance(error.value.__cause__, QCompilerError)


@pytest.mark.parametrize("wrong", [torch.ones(2), 3])
def test_batches_of_a_wrong_type(wrong: Any) -> None:
    with pytest.raises(
        InputError, match=r"the calibration batches have the wrong type: got (Tensor|int); need an iter"
    ):
        Calibration(wrong)


@pytest.mark.parametrize(("progress", "shown"), [(None, False), (False, False), (True, True)])
def test_progress_goes_to_standard_error(
    progress: bool | None, shown: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    Calibration(data((1, 1), (1, 2))).observe(model(), ["h"], progress=progress)
    out, err = capsys.readouterr()
    assert out == "" and ("calibrating" in err) == shown


# What was seen


def test_zeros_are_an_error_unless_a_top_k_accounts_for_them() -> None:
    graph = model()
    calibration = Calibration([[torch.zeros(1, 3, 8, dtype=torch.bfloat16), 1]] * 2)
    calibration.observe(graph, ["h"])
    assert not calibration.check_seen(graph, "h", after_top_k=True)
    with pytest.raises(InputError) as error:
        calibration.check_seen(graph, "h", after_top_k=False)
    assert str(error.value) == (
        "calibration saw only zeros or no rows in %h: got 6 rows of zeros in 2 batches; need at least one nonzero "
        'element (in aten.linear loc("m.py":3 in "up")). Use calibration data that activates this part of the model.'
    )
    calibration = Calibration(data((0, 3)))
    calibration.observe(graph, ["h"])
    with pytest.raises(
        InputError,
        match="calibration saw only zeros or no rows in %h: got no row in 1 batch; need at least one nonzero element",
    ):
        calibration.check_seen(graph, "h", after_top_k=False)
    with pytest.raises(InputError, match="a value was not observed: got %a"):
        calibration.check_seen(graph, "a", after_top_k=True)
    seen = Calibration(data((1, 1)))
    seen.observe(graph, ["h"])
    assert seen.check_seen(graph, "h", after_top_k=False)


def test_coverage_is_a_table_with_the_worst_first() -> None:
    graph, calibration = model(), Calibration(data((2, 3)))
    calibration.observe(graph, ["wide", "a", "x"])
    calibration.statistics["expert[0]"] = Statistics.empty(4)
    a = calibration.statistics["a"]
    a.update(torch.full((1, 4), 1000.0))
    rows = calibration.coverage.rows
    assert [(row.value, row.module, row.rows, row.channels, row.unseen) for row in rows] == [
        ("expert[0]", "", 0, 4, True),
        *[(row.value, row.module, 6, 8, False) for row in rows[1:3]],
        ("a", "act", 7, 4, False),
    ]
    assert {row.value: row.module for row in rows[1:3]} == {
        "wide": "act",
        "x": "up",
    }  # a cast's, and an input's, reader
    assert rows[1].absmax > rows[2].absmax and rows[3].absmax == 1000
    assert calibration.coverage.unseen == rows[:1]
    lines = str(calibration.coverage).splitlines()
    assert lines[0].split() == ["value", "module", "rows", "channels", "absmax"]
    assert lines[2].split() == ["%expert[0]", "0", "4", "0", "saw", "no", "token"]
    assert lines[-2].split() == ["%a", "act", "7", "4", "1000"]
    assert lines[-1] == "4 values observed; 1 saw no token"
    assert str(Calibration().coverage) == "no value was observed"
    assert repr(calibration) == "<Calibration: 4 values observed; 1 saw no token>"
    del calibration.statistics["expert[0]"], calibration.statistics["x"], calibration.statistics["a"]
    assert calibration.coverage.summary() == "1 value observed; each saw tokens"


# Files


def observed() -> Calibration:
    graph, calibration = model(), Calibration(data((2, 3), (0, 1), (3, 3)))
    calibration.observe(graph, ["a"])
    calibration.observe(graph, ["h"], histogram=True, rows=5)
    calibration.observe(graph, ["x"], rows=50)
    calibration.statistics["ü 重み/.."] = Statistics.empty(0, histogram=True)
    return calibration


@pytest.mark.parametrize("size", [0.0, 2.0**-90, 2.0**100])
def test_histograms_of_small_and_large_values_come_back(tmp_path: Path, size: float) -> None:
    calibration = Calibration()
    calibration.statistics["v"] = Statistics.empty(3, histogram=True)
    calibration.statistics["v"].update(torch.randn(50, 3) * size)
    calibration.save(tmp_path / "m.safetensors")
    loaded = Calibration.load(tmp_path / "m.safetensors").statistics["v"]
    known = calibration.statistics["v"]
    assert equal(Calibration.load(tmp_path / "m.safetensors"), calibration)
    assert loaded.histogram is not None and known.histogram is not None and loaded.histogram.low == known.histogram.low
    for observer in ("percentile", "mse"):
        assert torch.equal(loaded.amax(observer, "channel"), known.amax(observer, "channel"))


@pytest.mark.parametrize("bins", [[], "abc", {}, [0, 48, 5], [-127, -79, 5, 3], [1e400, 1, 5, 3], [0, 24, 5, 3]])
def test_bins_of_another_kind_are_no_bins(bins: Any) -> None:
    with pytest.raises(ValueError, match="its histograms have bins"):
        _low_of(bins)


def test_a_file_gives_the_same_bits(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    calibration = observed()
    calibration.save(path)
    loaded = Calibration.load(str(path))
    assert equal(loaded, calibration) and loaded.batches is None
    assert loaded.modules == {**calibration.modules, "ü 重み/..": ""}
    for name, old in calibration.statistics.items():
        new = loaded.statistics[name]
        for key, value in vars(old).items():
            if isinstance(value, Tensor):
                assert torch.equal(getattr(new, key), value)
            elif not hasattr(value, "update"):
                assert getattr(new, key) == value
    h = loaded.statistics["h"], calibration.statistics["h"]
    assert all(torch.equal(h[0].amax(o, "channel"), h[1].amax(o, "channel")) for o in ("percentile", "mse"))
    assert h[0].sample is not None and h[1].sample is not None and torch.equal(h[0].sample.rows, h[1].sample.rows)
    assert h[0].sample.capacity == 5
    h[0].update(torch.ones(1, 8))  # goes on
    loaded.save(path)
    assert not equal(Calibration.load(path), calibration)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.safetensors"]


def test_equal_statistics_make_equal_files_and_digests(tmp_path: Path) -> None:
    for name in ("one", "two"):
        observed().save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    turned = observed()
    turned.statistics = dict(reversed(turned.statistics.items()))
    assert turned.digest == observed().digest and len(turned.digest) == 64
    turned.statistics["a"].absmax[2] += 1e-3
    assert turned.digest != observed().digest


def load_or_message(path: Path) -> Calibration | str:
    try:
        return Calibration.load(path)
    except InputError as error:
        return str(error)


@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=60)
def test_a_damaged_file_is_never_taken(tmp_path_factory: pytest.TempPathFactory, at: float, bit: int) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped"
    calibration = observed()
    calibration.save(path)
    raw = bytearray(path.read_bytes())
    raw[int(at * len(raw))] ^= 1 << bit
    path.write_bytes(raw)
    loaded = load_or_message(path)
    # Bytes that are not part of the contents, such as a space in the head, may differ.
    assert path.name in loaded if isinstance(loaded, str) else equal(loaded, calibration)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_truncated_file(length: int, tmp_path: Path) -> None:
    path = tmp_path / "short"
    observed().save(path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError) as error:
        Calibration.load(path)
    assert str(error.value).startswith(f"the calibration file cannot be read: got {path}: ")


def test_missing_foreign_and_newer_files(tmp_path: Path) -> None:
    path = tmp_path / "other"
    with pytest.raises(InputError, match=r"the calibration file cannot be read: got .*other"):
        Calibration.load(path)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(InputError, match=r"this is not a calibration file: got .*other; need a file written by"):
        Calibration.load(path)
    save_file({}, path, metadata={"qcompiler.calibration": json.dumps({"version": 7, "new": []})})
    with pytest.raises(InputError) as error:
        Calibration.load(path)
    assert str(error.value) == (
        f"the calibration file is newer than this qcompiler: got {path}, version 7; need version 1. Read it with the "
        "version of qcompiler that wrote it, or a newer one."
    )
    for head in ("{", "[]", "{}", '{"version": "1"}', '{"version": 1, "values": [{"name": "x"}], "digest": ""}'):
        save_file({}, path, metadata={"qcompiler.calibration": head})
        with pytest.raises(InputError, match=r"the calibration file is damaged: got .*other: .*Calibrate again"):
            Calibration.load(path)


def test_tensors_of_another_shape_are_found(tmp_path: Path) -> None:
    path = tmp_path / "m"
    observed().save(path)
    tensors = load_file(path)
    head = path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")]
    tensors["0.absmax"] = torch.ones(5)
    save_file(tensors, path, metadata=json.loads(head)["__metadata__"])
    with pytest.raises(InputError, match=r"0.absmax is torch.float32\[5\], not torch.float32\[4\]"):
        Calibration.load(path)


def test_a_failed_save_leaves_what_was_there(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        observed().save(tmp_path / "none" / "m")
    assert str(error.value).startswith(f"the calibration cannot be saved: got {tmp_path / 'none' / 'm'}: ")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="the calibration cannot be saved"):
        observed().save(tmp_path / "folder")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]
