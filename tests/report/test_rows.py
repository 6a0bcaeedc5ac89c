"""Equal rows of a report in one line: when rows are equal, ranges of numbers, and that each row appears."""

import re
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from qcompiler.report.report import Report
from qcompiler.report.rows import Row, collapsed


def row(module: str, name: str = "", **changes: object) -> Row:
    made = Row(
        name or module, "aten.linear", module, (f"{module}.weight",), "f32[64, 64]", 100, True, "", "", "fp8_tile"
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def modules(*rows: Row) -> list[str]:
    return [each.module for each in collapsed(rows)]


def test_layers_of_a_stack_are_one_line() -> None:
    rows = [row(f"model.layers.{i}.{part}_proj") for i in range(12) for part in ("q", "k")]
    first, second = collapsed(rows)
    assert (first.module, second.module) == ("model.layers.0-11.q_proj x12", "model.layers.0-11.k_proj x12")
    assert first.bytes == 1200 and first.name == "model.layers.0.q_proj ..." and first.format == "fp8_tile"


def test_what_is_not_equal_stays_apart() -> None:
    plain = [row(f"m.{i}.a") for i in range(6)]
    assert modules(*plain) == ["m.0-5.a x6"]
    for changes in ({"format": "int8_row"}, {"quantized": False, "reason": "it is a router"}, {"shape": "f32[1, 64]"},
                    {"remark": "smoothed"}):  # fmt: skip
        changed = [*plain[:3], replace(plain[3], **changes), *plain[4:]]
        assert modules(*changed) == ["m.0-2,4-5.a x5", "m.3.a"]
    assert modules(row("0"), row("2"), row("lm_head")) == ["0", "2", "lm_head"]  # a Sequential is not a stack of layers


def test_numbers_that_are_all_combinations() -> None:
    experts = [row(f"m.{i}.e.{j}.up") for i in range(3) for j in range(4)]
    assert modules(*experts) == ["m.0-2.e.0-3.up x12"]
    assert modules(*experts, row("m.3.e.0.up")) == [
        "m.0.e.0-3.up x4",
        "m.1.e.0-3.up x4",
        "m.2.e.0-3.up x4",
        "m.3.e.0.up",
    ]
    twice = [row("m.0.a", "x"), row("m.0.a", "y"), row("m.1.a", "z")]  # one module that is called twice
    assert modules(*twice) == ["m.0.a", "m.0.a", "m.1.a"]


def test_names_of_values_in_reasons() -> None:
    rows = [
        row(f"m.{i}.a", quantized=False, reason=f"it is constant (%m.{i}.w)", remark=f"into %n_{i}") for i in range(3)
    ]
    (one,) = collapsed(rows)
    assert (one.reason, one.remark) == ("it is constant", "into %...")
    (same,) = collapsed([replace(each, reason="it reads %x", remark="") for each in rows])
    assert same.reason == "it reads %x"


@given(st.sets(st.tuples(st.integers(0, 4), st.integers(0, 3), st.sampled_from("ab")), min_size=1))
def test_every_row_is_in_one_line(cells: set[tuple[int, int, str]]) -> None:
    rows = [row(f"m.{i}.e.{j}.{part}") for i, j, part in sorted(cells)]
    lines = list(collapsed(rows))
    assert sum(line.bytes for line in lines) == 100 * len(rows)
    counts = [int(found[1]) if (found := re.search(r" x(\d+)$", line.module)) else 1 for line in lines]
    assert sum(counts) == len(rows)


def test_printed_and_in_full() -> None:
    rows = tuple(row(f"model.layers.{i}.q_proj") for i in range(32))
    report = Report(rows, 3200, 3200, 800)
    assert len(report.rows) == 32 and len(str(report).splitlines()) == 4
    assert "model.layers.0-31.q_proj x32" in str(report) and str(report).splitlines()[-1].startswith("32 of 32 matmuls")
