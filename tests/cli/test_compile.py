"""`qcompiler compile`, and the commands on its output: inspect, report, check, bench."""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import qcompiler
from qcompiler.cli import main
from qcompiler.cli.requests import overrides_of
from qcompiler.errors import QCompilerError

FACTORIES = '''"""Models of a test."""

import torch


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.SiLU(), torch.nn.Linear(256, 128)).train()


def with_inputs():
    return network(), (torch.randn(4, 256),)


def with_names():
    return network(), {"input": torch.randn(4, 256)}


class Holder:
    @staticmethod
    def make():
        return with_inputs()[0], torch.randn(2, 256)


def failing():
    raise ValueError("no weights today")


def of_nothing():
    return torch.nn.ReLU(), torch.randn(4, 256)


def no_model():
    return "model.bin"


def wrong_inputs():
    return network(), 3


number = 3
'''


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a module of factories in it."""
    (tmp_path / "cli_factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # which main does, too; this way it is undone
    monkeypatch.delitem(sys.modules, "cli_factories", raising=False)
    return tmp_path


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small artefact, for what only reads it."""
    folder = tmp_path_factory.mktemp("artefact") / "small"
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.SiLU(), torch.nn.Linear(256, 128)).eval()
    qcompiler.compile(model, example_inputs=(torch.randn(4, 256),)).save(folder)
    return folder


Answer = Callable[..., Any]


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Answer:
    """Runs a command that prints JSON."""

    def run(*arguments: str, status: int = 0) -> Any:
        assert main([*arguments, "--json"]) == status
        out, err = capsys.readouterr()
        assert err == ""  # progress is for terminals
        return json.loads(out)

    return run


# Models


@pytest.mark.parametrize("factory", ["with_inputs", "with_names", "Holder.make"])
def test_a_factory_gives_model_and_inputs(factory: str, here: Path, answer: Answer) -> None:
    found = answer("compile", f"cli_factories:{factory}", "-o", "out")
    assert [row["quantized"] for row in found["report"]["rows"] if row["op"] == "aten.linear"] == [True, True]
    assert [*found["seconds"]] == ["loading", "capture", "passes", "code generation", "saving"]
    assert found["scheme"] == "fp8_tile" and found["pipeline"].startswith("canonicalize; attention; dead-code; ")
    compiled = qcompiler.load(here / "out")
    assert compiled(torch.randn(7, 256)).shape == (7, 128)


def test_what_is_saved_computes_what_the_library_compiles(here: Path) -> None:
    assert main(["compile", "cli_factories:with_inputs", "-o", "out", "-s", "fp8_row"]) == 0
    from cli_factories import network  # type: ignore[import-not-found]  # written by the fixture

    x = torch.randn(5, 256)
    want = qcompiler.compile(network().eval(), scheme="fp8_row", example_inputs=(x,))
    assert torch.equal(qcompiler.load("out")(x), want(x))


def test_an_exported_program(here: Path, answer: Answer) -> None:
    model, x = torch.nn.Linear(256, 128).eval(), torch.randn(4, 256)
    torch.export.save(torch.export.export(model, (x,)), here / "model.pt2")
    assert answer("compile", "model.pt2", "-o", "out")["report"]["summary"].startswith("1 of 1 matmul")


def test_inputs_by_type_by_file_and_from_calibration(here: Path, answer: Answer) -> None:
    save_file({"input": torch.randn(3, 256)}, "call.safetensors")
    save_file({f"{n}.input": torch.randn(3 + n, 256) for n in range(3)}, "calls.safetensors")
    for given in (["--input", "input=f32[2,256]"], ["--input", "0=f32[2,256]"], ["--example", "call.safetensors"]):
        assert answer("compile", "cli_factories:network", "-o", "out", *given)["report"]["summary"].startswith("2 of 2")
    calibrated = answer(
        "compile", "cli_factories:network", "-o", "out", "-s", "smoothquant_o3", "--calibration", "calls.safetensors"
    )
    assert "calibrate" in calibrated["pipeline"]
    known = qcompiler.load("out").calibration
    assert known is not None and known.statistics["input"].rows == 3 + 4 + 5


def test_sizes_can_be_held(here: Path) -> None:
    assert main(["compile", "cli_factories:with_inputs", "-o", "out", "--fixed-sizes"]) == 0
    with pytest.raises(qcompiler.InputError, match="has a different size than at capture: got 7; need 4"):
        qcompiler.load("out")(torch.randn(7, 256))


def test_overrides_and_pipelines(here: Path, answer: Answer) -> None:
    found = answer("compile", "cli_factories:with_inputs", "-o", "out", "--override", "2.*=none")
    assert [row["quantized"] for row in found["report"]["rows"]] == [True, False]
    found = answer("compile", "cli_factories:with_inputs", "-o", "out", "-p", "dead-code", "--allow-unquantized")
    assert found["scheme"] is None and found["pipeline"] == "dead-code"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["cli_factories:failing"],
            "the factory cli_factories:failing failed: got ValueError: no weights today. Run ag",
        ),
        (
            ["cli_factories:no_model"],
            "the factory cli_factories:no_model does not return a model: got str; need a model (torch.",
        ),
        (
            ["cli_factories:wrong_inputs"],
            "the factory cli_factories:wrong_inputs returns invalid example inputs: got int;",
        ),
        (["cli_factories:number"], "module cli_factories has no such factory: got 'number'; need a function without"),
        (["cli_factories:lost"], "module cli_factories has no such factory: got 'lost'"),
        (["not_there:make"], "the module of the factory cannot be imported: got 'not_there': ModuleNotFoundError: "),
        (
            ["not_there"],
            "there is no such model: got 'not_there'; need a .pt2 file, a folder with a config.json, or mod",
        ),
        (["not_there.pt2"], "there is no such exported program: got not_there.pt2; need a file that torch.export.save"),
        (["cli_factories.py.pt2"], "the exported program cannot be loaded: got cli_factories.py.pt2: "),
        (["."], "the folder holds no checkpoint: got ., which has "),
        (["cli_factories:network"], "capturing the model needs example inputs: got none. Give some: --input "),
        (["cli_factories:of_nothing"], "nothing was quantized: got the pipeline "),
        (["cli_factories:with_inputs", "-s", "fp9"], "no such scheme: got 'fp9'"),
        (
            ["cli_factories:with_inputs", "-s", "smoothquant_o3"],
            "the passes need calibration data: got smoothquant_o3. ",
        ),
        (["cli_factories:with_inputs", "-s", ""], "<scheme>:1:1: expected the name of a scheme"),
        (
            ["cli_factories:network", "--input", "x=f32[4,256]"],
            "the example inputs do not match the signature of the model's forward: got 'x': "
            "missing a required argument: 'input'",
        ),
        (["cli_factories:with_inputs", "--override", "x"], "an override is malformed: got 'x'; need PATTERN=SCHEME"),
        (["cli_factories:with_inputs", "-p", "dead-code", "--override", "x=none"], "both overrides and a pipeline are"),
        (
            ["cli_factories:failing", "--target", "gpu"],
            "no such target: got 'gpu'. Use target='cuda' for the model's GPU, or 'sm_90a' for NVIDIA "
            "Hopper. Known: auto, cpu, cuda, iree-cpu, sm_90a.",
        ),
        (["cli_factories:with_inputs", "--device", "tpu"], "there is no such device: got 'tpu'"),
        (["cli_factories:with_inputs", "-o", "cli_factories.py"], "the artefact would replace a file: got "),
    ],
)
def test_what_cannot_be_compiled(
    arguments: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "cli_factories.py.pt2").write_text("no program")
    assert main(["compile", "-o", "out", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {message}")
    assert "Traceback" not in err and not (here / "out").exists()


def test_a_damaged_program_is_one_sentence_and_no_log(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    (here / "empty.pt2").touch()
    logger = logging.getLogger("torch.export")  # it hands nothing on to the root
    logger.addHandler(caplog.handler)
    try:
        assert main(["compile", "-o", "out", "empty.pt2"]) == 1
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records and not logger.disabled


def test_the_way_out_of_nothing_quantized_is_an_argument(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compile", "cli_factories:of_nothing", "-o", "out"]
    assert main(command) == 1 and "--allow-unquantized on the command line" in capsys.readouterr().err
    assert main([*command, "--allow-unquantized"]) == 0


def test_what_is_no_artefact_is_named_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "out").mkdir()
    (here / "out" / "notes.txt").write_text("mine")
    assert main(["compile", "cli_factories:with_inputs", "-o", "out"]) == 1
    err = capsys.readouterr().err
    assert err.count(str(here / "out")) == 1 and err.count("got") == 1
    assert (here / "out" / "notes.txt").read_text() == "mine"


# Artefacts


def test_an_artefact_is_inspected(artefact: Path, answer: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    stages = {stage["stage"]: stage for stage in answer("inspect", str(artefact))["stages"]}
    assert stages["fp8-tile"]["effect"] == "lossy" and stages["fp8-tile"]["changed"] is True
    assert stages["canonicalize"]["changed"] is False and stages["fp8-tile"]["seconds"] > 0
    assert answer("inspect", str(artefact), "--source")["source"] == qcompiler.load(artefact).source
    assert main(["inspect", str(artefact)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split()[:4] == ["stage", "effect", "changed", "ms"]
    assert out.splitlines()[-2].startswith("fp8_tile for cpu, made by qcompiler ")
    assert out.splitlines()[-1].startswith("2 of 2 matmuls with a constant operand are quantized")


def test_a_report_is_printed_and_written(artefact: Path, here: Path, answer: Answer, capsys: Any) -> None:
    report = qcompiler.load(artefact).report
    assert main(["report", str(artefact)]) == 0
    assert capsys.readouterr().out == f"{report}\n"
    assert len(answer("report", str(artefact))["rows"]) == len(report.rows)
    errors = answer("report", str(artefact), "--against", "cli_factories:with_inputs")["errors"]
    assert [row["name"] for row in errors] == ["linear", "linear_1"]
    assert all(20 < row["own"] < 40 for row in errors)  # decibels
    page = here / "page.html"
    assert main(["report", str(artefact), "--html", str(page)]) == 0
    assert "<html" in page.read_text() and "fp8-tile" in page.read_text()
    assert main(["report", str(artefact), "--html", str(here / "no" / "page.html")]) == 1
    assert (
        f"error: the report cannot be written: got {here / 'no' / 'page.html'}: the folder does not exist; need"
        in capsys.readouterr().err
    )
    assert main(["report", str(artefact), "--html", str(here)]) == 1
    err = capsys.readouterr().err
    assert f"got {here}: Is a directory; need the path of a file, in a folder that can be written" in err
    assert not [*here.glob(".*")] and not [*here.parent.glob(f".{here.name}.*")]


def test_an_artefact_is_checked(artefact: Path, here: Path, answer: Answer, capsys: Any) -> None:
    assert answer("check", str(artefact))["ok"] is True
    answer("compile", "cli_factories:with_inputs", "-o", "out")
    (here / "out" / "host.py").write_text("print('edited')\n")
    found = answer("check", "out", status=1)
    assert found["ok"] is False and len(found["problems"]) == 1 and "host.py" in found["problems"][0]
    assert main(["check", "out"]) == 1
    assert "wrong: a file of the artefact" in capsys.readouterr().out
    assert main(["bench", "out"]) == 1
    assert main(["check", "nowhere"]) == 1
    assert capsys.readouterr().err.endswith("need a folder that compiled.save wrote\n")


def test_calls_are_timed(artefact: Path, here: Path, answer: Answer, capsys: Any) -> None:
    found = answer("bench", str(artefact), "--rows", "1,3", "--repeats", "2", "--against", "cli_factories:network")
    assert [call["inputs"] for call in found["calls"]] == [{"0": "f32[1, 256]"}, {"0": "f32[3, 256]"}]
    for call in found["calls"]:
        assert [*call["milliseconds"]] == ["artefact", "against"]
        assert all(0 < each["least"] <= each["median"] for each in call["milliseconds"].values())
    assert found["versions"]["torch"] == torch.__version__ and "CPU" in found["device"]
    assert main(["bench", str(artefact), "--input", "0=f32[2,256]", "--repeats", "1"]) == 0
    assert "0: f32[2, 256]" in capsys.readouterr().out
    assert main(["bench", str(artefact), "--input", "0=f32[2,255]"]) == 1
    assert capsys.readouterr().err.startswith("error: dimension 1 of ")


def test_a_model_that_takes_other_calls_is_no_internal_error(artefact: Path, here: Path, capsys: Any) -> None:
    (here / "cli_factories.py").write_text(FACTORIES + "\n\ndef narrow():\n    return torch.nn.Linear(64, 64)\n")
    assert main(["bench", str(artefact), "--rows", "1", "--against", "cli_factories:narrow"]) == 1
    err = capsys.readouterr().err
    assert err.startswith(
        "error: the model to compare with does not accept the call: got cli_factories:narrow: RuntimeErr"
    )


@pytest.mark.parametrize("to", ["fp8", "iree"])
def test_damaged_weights_are_not_handed_on(to: str, here: Path, capsys: Any) -> None:
    command = ["compile", "cli_factories:with_inputs", "-o", "out"]
    assert main(command) == 0
    weights = here / "out" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    model = ["--model", "cli_factories:network"] if to == "fp8" else []
    capsys.readouterr()
    assert main(["export", "out", "--to", to, "-o", "exported", *model]) == 1
    assert capsys.readouterr().err.startswith(
        "error: a file of the artefact was edited or damaged: got another SHA-256"
    )
    assert not (here / "exported").exists()


def test_an_artefact_is_exported(artefact: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("torch_mlir")
    assert main(["export", str(artefact), "--to", "mlir-torch", "-o", str(tmp_path / "model.mlir")]) == 0
    assert f"{qcompiler.load(artefact).to_mlir()}\n" == (tmp_path / "model.mlir").read_text()
    assert main(["export", str(artefact), "--to", "mlir-torch", "--stage", "x", "-o", str(tmp_path / "m.mlir")]) == 1
    assert "error: no such stage: got 'x'" in capsys.readouterr().err


def test_a_checkpoint_is_written_beside_an_artefact(here: Path, capsys: Any) -> None:
    command = ["compile", "cli_factories:with_inputs", "-o", "out", "--checkpoint"]
    assert main([*command, "compressed-tensors=checkpoint"]) == 0
    found = qcompiler.checkpoints.read("checkpoint")
    assert [*found.stored] == ["0.weight", "2.weight"]
    capsys.readouterr()
    for given, message in (
        ("fp9=x", "no such checkpoint format: got 'fp9'"),
        ("fp8", "the checkpoint argument is malformed"),
    ):
        assert main([*command, given]) == 1
        assert capsys.readouterr().err.startswith(f"error: {message}")


def test_what_is_missing_for_iree_is_said_before_any_work(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch_mlir.ir", None)  # as where it is not installed
    assert main(["compile", "cli_factories:failing", "--target", "iree-cpu", "-o", "out"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: torch-mlir cannot be imported") and 'pip install "qcompiler[mlir]"' in err


def test_overrides_and_layers_to_ignore() -> None:
    assert overrides_of([]) is None and overrides_of([], []) is None
    assert overrides_of(["a=fp8_row", "b = none", "a=int8_row"], ["c", "b"]) == {"a": "int8_row", "c": None, "b": None}
    with pytest.raises(QCompilerError, match="a pattern is both ignored and overridden: got 'a'"):
        overrides_of(["a=fp8_row"], ["a"])
