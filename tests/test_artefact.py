"""`compiled.save` and `qcompiler.load`: what comes back is what was saved, in every bit."""

import copy
import hashlib
import inspect
import json
import subprocess
import sys
from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import qcompiler
from codegen.host import emit_host_module
from qcompiler import ArtefactError, CaptureError, CompiledModel, InputError, PassError
from qcompiler.artefact.checking import check
from qcompiler.artefact.manifest import sealed
from qcompiler.ir import Graph
from qcompiler.pass_manager import PASSES


class Mlp(nn.Module):
    """Sizes that 128 does not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(200, 136), nn.Linear(136, 64)

    def forward(self, x: Tensor, scale: float | None = None, *, shift: Tensor | None = None) -> Tensor:
        """What the model does."""
        y: Tensor = self.down(torch.relu(self.up(x)))
        y = y if shift is None else y + shift
        return y if scale is None else y * scale


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
    """Saved, looked at, and loaded; what is loaded saves itself as the same files."""
    compiled.save(folder / "first")
    found = check(folder / "first")
    assert found.ok, found
    loaded = qcompiler.load(folder / "first", **options)
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
    assert loaded.forward.__doc__ == "What the model does."
    for wrong, says in (((X.double(),), "another dtype"), ((X[:, :3],), "another size"), ((X, 2.0), "was not given")):
        with pytest.raises(InputError, match=says):
            loaded(*wrong)
    assert loaded.warmup(rows=[1, 2]).calls == 2


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
    assert manifest["pipeline"].startswith("canonicalize; dead-code;") and manifest["calibration"] is None
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


# State and weights


class Cache(nn.Module):
    """Writes rows to a cache, and says where it is."""

    keys: Tensor
    at: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.register_buffer("keys", torch.zeros(4, 64))
        self.register_buffer("at", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.keys.copy_(torch.cat([self.keys[1:], self.linear(x)]))
        self.at.add_(1)
        return self.keys.sum(0) * self.at


def test_state_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    fast = qcompiler.compile(Cache().eval(), example_inputs=(torch.randn(1, 64),))
    steps = torch.randn(3, 1, 64)
    fast(steps[0])
    loaded = again(fast, tmp_path)
    for step in steps[1:]:
        same(loaded(step), fast(step))
    before = files(tmp_path / "first")
    assert before == files(tmp_path / "second"), "calls change the model's own memory, not the files"
    fresh = qcompiler.load(tmp_path / "first", verify=True)
    assert int(fresh.graph.weights["at"]) == 1 and int(loaded.graph.weights["at"]) == 3


class Layouts(nn.Module):
    """Weights as they come: transposed, in channels_last, parts of others, repeated, empty, scalar, shared, tied."""

    def __init__(self) -> None:
        super().__init__()
        base = torch.randn(96, 130)
        self.turned = nn.Parameter(torch.randn(64, 48).t())
        self.conv = nn.Conv2d(3, 16, 1).to(memory_format=torch.channels_last)
        self.part, self.other = nn.Parameter(base[:, :64]), nn.Parameter(base[2:50:2])
        self.repeated = nn.Parameter(torch.randn(1, 16).expand(5, 16))
        self.register_buffer("empty", torch.zeros(0, 16, dtype=torch.bfloat16))
        self.scalar = nn.Parameter(torch.tensor(2.5))
        self.linear, self.tied = nn.Linear(16, 16), nn.Linear(16, 16)
        self.tied.weight = self.linear.weight
        self.odd = nn.Parameter(torch.randn(7))

    def forward(self, image: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        y, some = self.tied(self.linear(x)) * self.scalar + self.repeated, x.sum()
        rest = (self.turned * some, self.part * some, self.other * some, self.odd + some)
        return self.conv(image), torch.cat([y, self.empty]), *rest


def test_weights_of_all_layouts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    call = (torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last), torch.randn(5, 16))
    fast = qcompiler.compile(Layouts().eval(), example_inputs=call, scheme="fp8_row")
    loaded = again(fast, tmp_path)
    same(loaded(*call), fast(*call))
    for name in ("turned", "conv.weight", "scalar", "odd"):
        mine, theirs = loaded.graph.weights[name], fast.graph.weights[name]
        assert (mine.shape, mine.stride()) == (theirs.shape, theirs.stride()), name
    assert all(tensor.data_ptr() % 64 == 0 for tensor in loaded.graph.weights.values())


def test_a_tied_weight_is_stored_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.inner, self.head = nn.Embedding(50, 32), nn.Linear(32, 32), nn.Linear(32, 50, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.inner(self.table(ids))) + self.table.weight.sum()  # type: ignore[no-any-return]

    ids = torch.randint(0, 50, (2, 5))
    fast = qcompiler.compile(Tied().eval(), example_inputs=(ids,))
    loaded = again(fast, tmp_path)
    same(loaded(ids), fast(ids))
    stored = load_file(tmp_path / "first" / "weights.safetensors")
    assert sum(tensor.shape == (50, 32) for tensor in stored.values()) == 1


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.float8_e8m0fnu, torch.complex64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
        torch.uint16, torch.uint32, torch.uint64, torch.bool,
    ],
)  # fmt: skip
def test_every_element_type(tmp_path: Path, dtype: torch.dtype) -> None:
    """With all bit patterns that it has, NaN and negative zero among them."""
    patterns = torch.arange(256, dtype=torch.uint8).repeat(16).view(dtype)
    values = patterns if dtype is not torch.bool else torch.arange(64) % 2 == 0
    kind = str(qcompiler.TensorType.of(values))
    graph = Graph.parse(
        f"""func @main(%x: f32[2]) -> (f32[2], {kind}) {{
          %w = core.param() {{name = "w"}} : {kind}
          %v = core.param() {{name = "v"}} : f32[2]
          %y = aten.add.Tensor(%x, %v) : f32[2]
          %z = aten.view_as(%w, %w) : {kind}
          return %y, %z
        }}"""
    )
    graph.weights = {"w": values, "v": torch.ones(2)}
    fast = qcompiler.compile(graph, pipeline="", strict=False)
    loaded = again(fast, tmp_path)
    same(loaded.graph.weights["w"], values)
    same(loaded(torch.zeros(2)), fast(torch.zeros(2)))


def test_shards(fast: CompiledModel, tmp_path: Path) -> None:
    fast.save(tmp_path / "model", shard_bytes=10_000)
    names = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(names) > 1 and names[0] == f"weights-00001-of-{len(names):05d}.safetensors"
    stored = [load_file(tmp_path / "model" / name) for name in names]
    assert all(sum(t.nbytes for t in part.values()) <= 10_000 or len(part) == 1 for part in stored)
    assert {name for part in stored for name in part} == set(fast.graph.weights)
    same(qcompiler.load(tmp_path / "model", verify=True)(X), fast(X))
    (tmp_path / "model" / names[1]).unlink()
    with pytest.raises(ArtefactError, match=f"is missing: got No such file or directory .*{names[1]}"):
        qcompiler.load(tmp_path / "model")


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
    command = [sys.executable, "-c", FRESH, saved, tmp_path / "other", tmp_path / "call.pt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.stdout.startswith("True\n"), done.stderr
    assert f"of a class that is not known here: got {Pair.__module__}:Pair; need a named tuple with" in done.stdout
    assert done.stdout.endswith(f"Import {Pair.__module__} before the artefact is loaded.\n")


def test_numbers_and_conditions_on_sizes(tmp_path: Path) -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            z = self.linear(x)
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
