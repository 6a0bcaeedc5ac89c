"""`compiled.save` and `qcompiler.load`: the loaded model equals the saved one in every bit."""

import copy
import hashlib
import inspect
import json
import shutil
import subprocess
import sys
from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import Mlp
from torch import Tensor, nn

import qcompiler
from codegen.host import emit_host_module
from qcompiler import ArtefactError, CaptureError, CompiledModel, InputError, PassError
from qcompiler.artefact.checking import check
from qcompiler.artefact.manifest import sealed
from qcompiler.ir import Graph
from qcompiler.pass_manager.pipeline import PASSES
from qcompiler.testing import random_graph, random_inputs


@pytest.fixture(scope="module")
def fast() -> CompiledModel:
    torch.manual_seed(0)
    return qcompiler.compile(Mlp().eval(), example_inputs=(torch.randn(4, 200),))


@pytest.fixture(scope="module")
def saved(fast: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    fast.save(folder)
    return folder


X = torch.randn(5, 200, generator=torch.Generator().manual_seed(1))
SHORT = "fp8-tile; fuse-linear; fold-constants; to-kernels"


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def again(compiled: CompiledModel, folder: Path, **options: Any) -> CompiledModel:
    """Saves, checks and loads a model; the loaded model saves the same files."""
    compiled.save(folder / "first")
    found = check(folder / "first")
    assert found.ok, found
    loaded: CompiledModel = qcompiler.load(folder / "first", **options)
    loaded.save(folder / "second")
    assert files(folder / "first") == files(folder / "second")
    return loaded


def same(got: Any, want: Any) -> None:
    """Equal bits, NaN included, in the same structure."""
    got_leaves, got_spec = torch.utils._pytree.tree_flatten(got)
    leaves, spec = torch.utils._pytree.tree_flatten(want)
    assert got_spec == spec
    for one, other in zip(got_leaves, leaves, strict=True):
        if not isinstance(other, Tensor):
            assert one == other
            continue
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


# All of a model


def test_a_loaded_model_gives_equal_bits(fast: CompiledModel, tmp_path: Path) -> None:
    loaded = again(fast, tmp_path)
    for rows in (0, 1, 5, 130):
        x = torch.randn(rows, 200)
        same(loaded(x), fast(x))


def test_it_shows_all_that_the_compiled_model_shows(fast: CompiledModel, saved: Path) -> None:
    loaded = qcompiler.load(saved)
    assert str(loaded.graph) == str(fast.graph)
    assert [(name, str(graph)) for name, graph in loaded.stages.items()] == [
        (name, str(graph)) for name, graph in fast.stages.items()
    ]
    assert (loaded.steps, loaded.report, loaded.source) == (fast.steps, fast.report, fast.source)
    assert (loaded.pipeline, loaded.calibration, loaded.origin) == (fast.pipeline, None, None)
    assert loaded.settings.scheme == "fp8_tile" and not loaded.training
    assert list(loaded.state_dict()) == list(fast.state_dict())
    assert str(loaded).splitlines()[1] == str(fast).splitlines()[1]


def test_it_is_called_as_the_model_is(fast: CompiledModel, saved: Path) -> None:
    loaded = qcompiler.load(saved)
    same(loaded(x=X), fast(x=X))
    same(loaded(X, scale=None), fast(X, scale=None))
    shown = inspect.signature(loaded.forward)
    assert list(shown.parameters) == ["x", "scale", "shift"]
    assert shown.parameters["shift"].kind is inspect.Parameter.KEYWORD_ONLY
    assert shown.parameters["scale"].default is None and shown.parameters["x"].default is inspect.Parameter.empty
    assert loaded.forward.__doc__ == "f32[rows, 200] -> f32[rows, 64]."
    for wrong, says in (
        ((X.double(),), "different dtype"),
        ((X[:, :3],), "different size"),
        ((X, 2.0), "was not given"),
    ):
        with pytest.raises(InputError, match=says):
            loaded(*wrong)
    assert loaded.warmup(rows=[1, 2]).calls == 2


# Dynamo, when it is first loaded, imports parts of torch that torch itself deprecates.
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_torch_compile_takes_it(fast: CompiledModel, saved: Path) -> None:
    torch._dynamo.reset()
    loaded: CompiledModel = qcompiler.load(saved)
    same(torch.compile(loaded, backend="eager", fullgraph=True)(X), fast(X))


def test_its_errors_are_attributed_as_those_of_the_compiled_model(tmp_path: Path) -> None:
    model = Mlp().eval()
    fast = qcompiler.compile(model, example_inputs=(X,))
    fast.save(tmp_path / "model")
    loaded = qcompiler.load(tmp_path / "model")
    assert str(qcompiler.attribute_error(loaded, X, model)) == str(qcompiler.attribute_error(fast, X))


def test_a_copy_of_a_loaded_model(fast: CompiledModel, saved: Path) -> None:
    loaded = qcompiler.load(saved)
    twin = copy.deepcopy(loaded)
    next(iter(twin.graph.weights.values())).zero_()
    same(loaded(X), fast(X))
    loaded.load_state_dict({key: torch.zeros_like(value) for key, value in loaded.state_dict().items()})
    assert not loaded(X).any()
    same(qcompiler.load(saved)(X), fast(X))


def test_the_manifest(saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    assert manifest["made_by"]["torch"] == torch.__version__ and manifest["made_by"]["qcompiler"]
    assert (manifest["scheme"], manifest["numerics"], manifest["target"]) == ("fp8_tile", ["deepseek"], "cpu")
    assert manifest["pipeline"].startswith("canonicalize; attention; dead-code;") and manifest["calibration"] is None
    assert manifest["source"] == manifest["files"]["host.py"]["sha256"]
    assert sealed(manifest)["digest"] == manifest["digest"]
    for item in manifest["stages"]:
        Graph.parse((saved / item["file"]).read_text()).verify()


def test_the_scheme_with_its_options_and_what_some_layers_have_instead(tmp_path: Path) -> None:
    scheme, overrides = "fp8_tile{k_block=64, numerics=vllm}", {"up.*": "fp8_row"}
    fast = qcompiler.compile(Mlp().eval(), example_inputs=(X,), scheme=scheme, overrides=overrides)
    loaded = again(fast, tmp_path)
    assert (loaded.settings.scheme, loaded.settings.overrides) == (scheme, overrides)
    same(loaded(X), fast(X))
    assert json.loads((tmp_path / "first" / "manifest.json").read_text())["numerics"] == ["deepseek", "vllm"]


def test_a_calibration_is_read_when_it_is_asked_for(tmp_path: Path) -> None:
    fast = qcompiler.compile(Mlp().eval(), scheme="int8_tensor_static", calibration=[X, X * 2])
    loaded = again(fast, tmp_path)
    same(loaded(X), fast(X))
    assert fast.calibration is not None and loaded.calibration is not None
    assert loaded.calibration.digest == fast.calibration.digest and loaded.calibration is loaded.calibration
    later = qcompiler.load(tmp_path / "first")
    (tmp_path / "second" / "calibration.safetensors").write_bytes(b"damaged".ljust(100))
    with pytest.raises(ArtefactError, match=r"calibration\.safetensors"):
        qcompiler.load(tmp_path / "second")
    assert later.calibration is not None


def test_passes_of_others_need_not_be_there(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Nothing(qcompiler.Pass):
        """Changes nothing."""

        name: ClassVar[str] = "nothing-at-all"
        times: int = 1

        def run(self, graph: Graph) -> bool:
            return False

    try:
        pipeline = f"nothing-at-all{{times=2}}; {SHORT}"
        fast = qcompiler.compile(Mlp().eval(), example_inputs=(X,), pipeline=pipeline)
    finally:
        del PASSES["nothing-at-all"]
    loaded = again(fast, tmp_path)
    same(loaded(X), fast(X))
    assert "nothing-at-all{times=2}" in str(loaded) and loaded.settings.scheme is None
    with pytest.raises(PassError, match="nothing-at-all"):
        _ = loaded.pipeline


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6))
def test_random_graphs(tmp_path: Path, seed: int) -> None:
    graph = random_graph(seed, runnable=True)
    inputs, graph.weights = random_inputs(graph, seed)
    fast = qcompiler.compile(graph, pipeline="dead-code", strict=False)
    for name in ("first", "second"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    same(again(fast, tmp_path)(*copy.deepcopy(inputs)), fast(*copy.deepcopy(inputs)))  # it may write to an input


def test_a_graph_without_passes_and_without_weights(tmp_path: Path) -> None:
    fast = qcompiler.compile(nn.ReLU().eval(), example_inputs=(X,), pipeline="dead-code", strict=False)
    same(again(fast, tmp_path)(X), fast(X))


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="the model is not captured yet"):
        qcompiler.compile(Mlp().eval()).save(tmp_path / "model")
    fast = qcompiler.compile(Mlp().eval(), example_inputs=(X,), pipeline=SHORT)
    with pytest.raises(ArtefactError, match="shard_bytes is wrong: got 0; need 1 or more"):
        fast.save(tmp_path / "model", shard_bytes=0)
    fast.graph.rename(fast.graph.outputs[0], "other")  # type: ignore[arg-type]
    with pytest.raises(ArtefactError, match="the graph was changed since it was compiled"):
        fast.save(tmp_path / "model")
    assert not list(tmp_path.iterdir())


# What goes in and what comes out


class Pair(NamedTuple):
    hidden: Tensor
    rest: dict[str, Any]


class Containers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(128, 128)

    def forward(self, batch: dict[str, Any], flag: bool = True, dtype: torch.dtype = torch.float32) -> Any:
        y = self.linear(batch["x"][0]).to(dtype)
        made = defaultdict(list, {"a": [y]})
        return Pair(
            y, {"ordered": OrderedDict(b=y + 1), "made": made, "queue": deque([y], maxlen=3), "none": (None, [])}
        )


def test_containers_of_all_kinds(tmp_path: Path) -> None:
    call = {"x": [torch.randn(3, 128)], "unused": (1, None, "text")}
    fast = qcompiler.compile(Containers().eval(), example_inputs=(call,))
    loaded = again(fast, tmp_path)
    got = loaded(call)
    same(got, fast(call))
    assert type(got) is Pair and type(got.rest["made"]) is defaultdict and got.rest["queue"].maxlen == 3
    assert type(got.rest["ordered"]) is OrderedDict and got.rest["none"] == (None, [])
    shown = inspect.signature(loaded.forward).parameters
    assert shown["flag"].default is True and shown["dtype"].default is torch.float32


FRESH = """
import sys, torch, qcompiler
folder, other, call = sys.argv[1:]
x, y = torch.load(call)
with torch.inference_mode():
    model = qcompiler.load(folder)
print(torch.equal(model(x), y))
try:
    qcompiler.load(other)
except qcompiler.ArtefactError as error:
    print(error)
"""


def test_in_a_fresh_process_which_does_not_know_every_class(fast: CompiledModel, saved: Path, tmp_path: Path) -> None:
    torch.save((X, fast(X)), tmp_path / "call.pt")
    other = qcompiler.compile(Containers().eval(), example_inputs=({"x": [torch.randn(3, 128)]},), pipeline=SHORT)
    other.save(tmp_path / "other")
    command = [sys.executable, "-c", FRESH, *map(str, (saved, tmp_path / "other", tmp_path / "call.pt"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.stdout.startswith("True\n"), done.stderr
    assert f"of a class that is not known here: got {Pair.__module__}:Pair; need a named tuple with" in done.stdout
    assert done.stdout.endswith(f"Import {Pair.__module__} before the artefact is loaded.\n")


def test_numbers_and_conditions_on_sizes(tmp_path: Path) -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            z: Tensor = self.linear(x)
            return z.sum(0) if x.shape[0] > y.shape[0] else z.mean(0)

    fast = qcompiler.compile(Steps().eval(), example_inputs=(torch.randn(9, 64), torch.randn(4, 3)))
    loaded = again(fast, tmp_path)
    x, y = torch.randn(12, 64), torch.randn(5, 3)
    same(loaded(x, y), fast(x, y))
    with pytest.raises(InputError) as want:
        fast(y.repeat(1, 22)[:, :64], x[:, :3])
    with pytest.raises(InputError) as got:
        loaded(y.repeat(1, 22)[:, :64], x[:, :3])
    assert str(got.value) == str(want.value)


# Where it runs


def as_if_for_a_gpu(folder: Path) -> None:
    """Rewrites an artefact as the same model would have been saved from a GPU."""
    manifest = json.loads((folder / "manifest.json").read_text())
    graph = Graph.parse((folder / manifest["stages"][-1]["file"]).read_text())
    (folder / "host.py").write_text(emit_host_module(graph, "sm_90a").source)
    text = (folder / "signature.json").read_text().replace('"device": "cpu"', '"device": "cuda:0"')
    (folder / "signature.json").write_text(text)
    for name in ("host.py", "signature.json"):
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest |= {"target": "sm_90a", "device": "cuda:0", "source": manifest["files"]["host.py"]["sha256"]}
    (folder / "manifest.json").write_text(json.dumps(sealed(manifest)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_a_model_of_a_gpu_comes_to_a_machine_without_one(fast: CompiledModel, tmp_path: Path) -> None:
    fast.save(tmp_path / "model")
    as_if_for_a_gpu(tmp_path / "model")
    assert check(tmp_path / "model").ok
    with pytest.raises(ArtefactError, match=r'is for cuda:0, and torch finds no such.*load\(folder, device="cpu"\)'):
        qcompiler.load(tmp_path / "model")
    loaded = qcompiler.load(tmp_path / "model", device="cpu")
    same(loaded(X), fast(X))
    assert loaded.source == fast.source


def test_a_device_that_is_none(saved: Path) -> None:
    with pytest.raises(ArtefactError, match="there is no such device: got gpu"):
        qcompiler.load(saved, device="gpu")
    with pytest.raises(qcompiler.CodegenError, match="no target runs on the model's device: got meta"):
        qcompiler.load(saved, device="meta")
