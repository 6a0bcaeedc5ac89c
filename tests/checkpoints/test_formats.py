"""A checkpoint format of another distribution needs one file: it is read, written, warned about, and a choice."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import qcompiler
from qcompiler.checkpoints import format as formats
from qcompiler.checkpoints import read, write
from qcompiler.cli.parser import build_parser, checkpoint_formats
from qcompiler.errors import QCompilerError

MODULE = '''
"""One byte for each weight, and one scale for each row: `quant_method: rows8`."""

import torch
from qcompiler.checkpoints.format import CheckpointFormat, register
from qcompiler.checkpoints.quantized_weight import StoredAs
from qcompiler.ir.formats import FP8_ROW

def stored_weights(said, tensors):
    format = FP8_ROW.with_block(tuple(said["block"]))
    return {f"{name[:-4]}weight": StoredAs(name, format) for name in tensors if name.endswith(".rows")}

class Rows:
    fix = "Use tiles."
    readers = ("transformers",)

    def why_not(self, weight):
        return None if weight.codes.dtype is torch.float8_e4m3fn else "its codes are not FP8"

    def why_unread(self, weight):
        return "their engine skips them"

    def tensors(self, name, weight):
        return {name: weight.codes, f"{name[:-6]}rows": weight.scale}

    def config(self, weights, unconverted):
        return {"quant_method": "rows8", "block": next(iter(weights.values())).block}

register(CheckpointFormat("rows8", read=stored_weights, writer=lambda _: Rows(), notes=lambda said: ["by rows"]))
'''
ENTRY_POINTS = """
[qcompiler.checkpoints]
rows8 = made_up_rows
rows9 = made_up_rows
"""


@pytest.fixture(autouse=True)
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A third-party distribution, installed."""
    site = tmp_path / "site"
    metadata = site / "made_up-1.2.dist-info"
    metadata.mkdir(parents=True)
    (site / "made_up_rows.py").write_text(MODULE)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: made-up\nVersion: 1.2\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(formats, "_FORMATS", dict(formats.our_formats()))
    yield
    sys.modules.pop("made_up_rows", None)


def test_a_format_of_one_file_is_written_and_read(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(128, 192)).eval()
    fast = qcompiler.compile(model, example_inputs=(torch.randn(4, 128),), target="cpu")
    with pytest.raises(QCompilerError, match=r"  \* \[192, 128\]: their engine skips them\. Leave") as caught:
        write(fast, tmp_path / "out", "rows8", model=model)
    assert "vLLM" not in str(caught.value), "vLLM does not know the format"
    write(fast, tmp_path / "out", "rows8", model=model, reader=None)
    assert {*load_file(tmp_path / "out" / "model.safetensors")} == {"0.weight", "0.rows", "0.bias"}
    found = read(tmp_path / "out")
    assert (found.method, found.notes, {*found.stored}) == ("rows8", ("by rows",), {"0.weight"})
    graph = fast.graph
    (linear,) = graph.ops("kernel.scaled_linear")
    stored = found.quantized("0.weight")
    assert torch.equal(stored.codes.view(torch.uint8), graph.weights[linear["w"].name].view(torch.uint8))
    assert torch.equal(stored.scale, graph.weights[linear["w_scale"].name])


def test_the_command_line_offers_it_without_loading_it() -> None:
    assert checkpoint_formats() == ["compressed-tensors", "float", "fp8", "qcompiler", "rows8", "rows9"]
    assert build_parser().parse_args(["export", "a", "--to", "rows8", "-o", "b"]).to == "rows8"
    assert "made_up_rows" not in sys.modules


def test_names_that_are_wrong(tmp_path: Path) -> None:
    for name, message in {
        "row8": "no such checkpoint format: got 'row8'. Did you mean 'rows8'?",
        "rows9": "an entry point does not register a format of its name: got 'rows9 = made_up_rows' of made-up 1.2",
        "fbgemm_fp8": "the checkpoint format can only be read: got 'fbgemm_fp8'",
    }.items():
        with pytest.raises(QCompilerError) as error:
            formats.writer_called(name, "float")
        assert str(error.value).startswith(message)
    with pytest.raises(QCompilerError, match="two checkpoint formats have one name: got 'fp8'"):
        formats.register(formats.CheckpointFormat("fp8"))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "float"}}))
    torch_file = tmp_path / "model.safetensors"
    torch_file.write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(QCompilerError, match=r"an unknown kind of quantization: got quant_method 'float'"):
        read(tmp_path)
