"""attribute_error of decoders: the keys and the values of each cache, against the same by hand."""

import json
import math
from pathlib import Path
from typing import Any

import decoding_models as models
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import qcompiler
from qcompiler import ErrorReport, Graph, InputError, Op, Pipeline, attribute_error, interpret, numerics
from qcompiler.capture import capture
from qcompiler.cli import main
from qcompiler.decoding.decoder import Decoder
from qcompiler.diagnostics.error_report import ErrorRow, sqnr
from qcompiler.ir.formats import FP8_ROW
from qcompiler.pass_manager.runner import run_pipeline

IDS = torch.randint(3, 60, (3, 11), generator=torch.Generator().manual_seed(1))


def made(model: Any, **options: Any) -> Decoder:
    sizes: dict[str, Any] = {"scheme": None, "max_batch": 3, "max_length": 32, "progress": False}
    return qcompiler.decoder(model, **{**sizes, **options})


def by_part(report: ErrorReport) -> dict[tuple[str, str], ErrorRow]:
    """(number of the layer, part) -> the row of a cache."""
    return {(row.module.split(".")[2], row.part): row for row in report.caches}


@pytest.fixture(scope="module")
def llama() -> Any:
    return models.llama()


@pytest.fixture(scope="module")
def captured(llama: Any) -> Graph:
    """The float model, captured once."""
    call = {"input_ids": IDS, "position_ids": torch.arange(IDS.shape[1]).expand(IDS.shape).contiguous()}
    return capture(llama, kwargs=call).graph


@pytest.fixture(scope="module")
def fp8(llama: Any) -> Decoder:
    return made(llama, kv_cache="fp8")


@pytest.mark.parametrize(
    "name",
    ["gpt2", "mistral", *(pytest.param(name, marks=pytest.mark.matrix) for name in ("llama", "gemma3", "cohere"))],
)
def test_a_cache_in_the_dtype_of_the_model_adds_nothing(name: str) -> None:
    model = models.MODELS[name]()
    report = attribute_error(made(model), IDS, outputs=True)
    assert report.rows == report.caches and len(report.rows) == 4
    assert {number for row in report.rows for number in (row.own, row.outputs, row.kernel)} == {math.inf}
    assert all(row.inherited > 100 for row in report.rows), "equal up to the order of additions"


def attentions(graph: Graph, fp8: Decoder) -> list[list[Tensor]]:
    """The queries, keys and values of each layer of the float model."""
    ops = fp8.stages["attention"].ops("attention.causal")
    wanted = [[op[name].name for name in ("query", "key", "value")] for op in ops]
    values: dict[str, Tensor] = {}

    def keep(op: Op, results: tuple[Any, ...]) -> None:
        values.update((value.name, result) for value, result in zip(op.results, results, strict=True))

    run_pipeline(Pipeline.parse("canonicalize; attention{consecutive=position_ids}"), graph)
    interpret(graph, [IDS, torch.arange(IDS.shape[1]).expand(IDS.shape)], observe=keep)
    return [[values[name] for name in names] for names in wanted]


def test_the_numbers_by_hand(captured: Graph, fp8: Decoder) -> None:
    rows = by_part(attribute_error(fp8, IDS, captured))
    for layer, (query, key, value) in enumerate(attentions(captured.clone(), fp8)):

        def attend(keys: Tensor, values: Tensor, query: Tensor = query) -> Tensor:
            return functional.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)

        want = attend(key, value)
        keys, values = (numerics.dequantize(*numerics.quantize(each, FP8_ROW), format=FP8_ROW) for each in (key, value))
        assert rows[str(layer), "keys"].own == pytest.approx(sqnr(want, attend(keys, value)), abs=1e-3)
        assert rows[str(layer), "values"].own == pytest.approx(sqnr(want, attend(key, values)), abs=1e-3)
    assert rows["0", "keys"].inherited == rows["0", "values"].inherited == math.inf
    assert 20 < rows["1", "keys"].inherited < 50 and 20 < rows["1", "values"].inherited < 50


@pytest.mark.parametrize("kv_cache", ["fp8", "int8_static"])
def test_a_cache_alone_changes_the_logits_as_the_row_says(kv_cache: str) -> None:
    """With keys of zero and one layer, the values are the only error of the decoder."""
    model = models.llama(num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.zero_()
        model.model.layers[0].self_attn.k_proj.weight[0, 0] = 1e-30  # a static scale of zero is refused
    static = [{"input_ids": IDS}] if kv_cache.endswith("static") else None
    llm = made(model, kv_cache=kv_cache, calibration=static)
    rows = by_part(attribute_error(llm, IDS, model, outputs=True))
    assert rows["0", "keys"].outputs == math.inf
    with torch.no_grad():
        want, got = model(IDS).logits, llm.for_transformers()(IDS).logits
    assert rows["0", "values"].outputs == pytest.approx(sqnr(want, got), abs=1e-2)


def test_the_layer_with_outliers_in_its_values_is_the_worst() -> None:
    """One channel of the values of layer 1 is enlarged, and the output projection undoes it."""
    model = models.llama(num_hidden_layers=3)
    attention = model.model.layers[1].self_attn
    size, queries = model.config.hidden_size // model.config.num_attention_heads, 2
    with torch.no_grad():
        attention.v_proj.weight[0] *= 1000
        for head in range(queries):
            attention.o_proj.weight[:, head * size] /= 1000
    report = attribute_error(made(model, kv_cache="int8"), IDS, outputs=True)
    worst, *rest = sorted(report.caches, key=lambda row: row.outputs or 0)
    assert (worst.module, worst.part) == ("model.layers.1.self_attn", "values")
    assert worst.outputs is not None and worst.outputs < min(row.outputs or 0 for row in rest) - 10


def test_linears_and_caches_are_rows_of_one_report(captured: Graph) -> None:
    compiled = qcompiler.compile(captured, scheme="int8_row")
    positions = torch.arange(IDS.shape[1]).expand(IDS.shape)
    plain = attribute_error(compiled, (IDS, positions), captured, outputs=True)
    llm = compiled.decoder(kv_cache="fp8", max_batch=2, max_length=32)
    report = attribute_error(llm, {"input_ids": IDS}, captured, outputs=True)
    assert [row.own for row in report.rows] == sorted(row.own for row in report.rows)
    linears = {row.name: row for row in report.rows if not row.part}
    assert linears.keys() == {row.name for row in plain.rows} and len(report.caches) == 4
    for row in plain.rows:
        assert linears[row.name].own == pytest.approx(row.own, abs=1e-3), "only caches are new"
        assert linears[row.name].outputs == pytest.approx(row.outputs, abs=1e-3)
    before = {row.name: row for row in plain.rows}
    assert linears["linear_3"].inherited < before["linear_3"].inherited, "the cache adds to what o_proj inherits"
    lines = str(report).splitlines()
    assert lines[0].split() == ["operation", "module", "own", "dB", "inherited", "dB", "kernel", "dB", "outputs", "dB"]
    assert sum(" keys " in line for line in lines) == sum(" values " in line for line in lines) == 2
    read = json.loads(report.to_json())
    assert [row.get("part", "") for row in read] == [row.part for row in report.rows]
    assert all(row["outputs"] is not None for row in read)


def test_an_artefact_has_the_same_report(
    llama: Any, captured: Graph, fp8: Decoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fp8.save(tmp_path / "artefact")
    assert attribute_error(qcompiler.load(tmp_path / "artefact"), IDS, captured) == attribute_error(fp8, IDS, captured)
    llama.save_pretrained(tmp_path / "model")
    given = ["--against", str(tmp_path / "model"), "--input", "input_ids=i64[2,9] in 3..60", "--outputs"]
    assert main(["report", str(tmp_path / "artefact"), "--html", str(tmp_path / "page.html"), "--json", *given]) == 0
    rows = json.loads(capsys.readouterr().out)["errors"]
    assert sorted(row["part"] for row in rows) == ["keys", "keys", "values", "values"]
    assert all(20 < row["outputs"] < 60 for row in rows)
    assert '"part":"keys"' in (tmp_path / "page.html").read_text(encoding="utf-8").replace(": ", ":")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (IDS.float(), "the batch of a decoder is wrong: got torch.float32 [3, 11]; need token ids i64[batch, length]"),
        (IDS[0], "the batch of a decoder is wrong: got torch.int64 [11]"),
        ({"input_ids": IDS, "labels": IDS}, "the batch of a decoder is wrong: got arguments input_ids, labels"),
        ({"input_ids": IDS, "attention_mask": IDS - IDS[0, 0]}, "the batch of a decoder is padded: got zeros in"),
        (IDS[:, :1], "the batch of a decoder has a wrong size: got [3, 1]; need one row or more, of 2 to 32 tokens"),
        (IDS.repeat(1, 3), "the batch of a decoder has a wrong size: got [3, 33]"),
    ],
)
def test_wrong_batches(captured: Graph, fp8: Decoder, batch: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        attribute_error(fp8, batch, captured)
    assert str(error.value).startswith(message)


def test_one_sequence_is_enough(captured: Graph, fp8: Decoder) -> None:
    one, two = (by_part(attribute_error(fp8, IDS[:1].repeat(count, 1), captured)) for count in (1, 2))
    assert one["0", "keys"].own == pytest.approx(two["0", "keys"].own)
