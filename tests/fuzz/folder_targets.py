"""Untrusted folders with one mutated file: artefacts of `compiled.save`, and checkpoints.

An input is a file name, a newline, and the new content of the file; `x.safetensors#header` is only the description
before the tensors. An artefact lists the hash of each of its files, so a change is detected at once; `artefact-sealed`
corrects the hashes to reach the parsers after that check, as an attacker would; `artefact-ranks` does so for a sharded
model.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from targets import Target, folder, header_of, in_order, with_header
from torch import nn

import qcompiler
from qcompiler.artefact.manifest import NAME, sealed
from qcompiler.artefact.strict_json import render
from qcompiler.checkpoints import read
from qcompiler.checkpoints.declarations import unread
from qcompiler.errors import ArtefactError
from qcompiler.program.folder_kinds import advice

HEADER = "#header"


@dataclass(frozen=True)
class Folder:
    """A valid folder.

    Attributes:
        path: The folder.
        files: Name -> content.
    """

    path: Path
    files: Mapping[str, bytes]

    @classmethod
    def at(cls, path: Path) -> "Folder":
        """The folder with its current files."""
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size)
        return cls(path, {file.relative_to(path).as_posix(): file.read_bytes() for file in files})

    def seeds(self) -> Iterable[bytes]:
        """Each file, and each header, as an input."""
        for name, data in self.files.items():
            yield name.encode() + b"\n" + data
            if name.endswith(".safetensors"):
                yield (name + HEADER).encode() + b"\n" + header_of(data)

    def change(self, given: bytes, otherwise: str) -> tuple[str, bytes]:
        """The file that an input names, and its new content."""
        line, _, data = given.partition(b"\n")
        name, mark, _ = line.decode("utf-8", "replace").partition(HEADER)
        if name not in self.files:
            return otherwise, given
        return name, with_header(self.files[name], data) if mark else data

    @contextmanager
    def holding(self, changes: Mapping[str, bytes]) -> Iterator[None]:
        """The folder with other files in it."""
        for name, data in changes.items():
            (self.path / name).write_bytes(data)
        try:
            yield
        finally:
            for name in changes:
                (self.path / name).write_bytes(self.files[name])


# Artefacts

PASSES = (
    "calibrate; quantize{x_format=#int8_tensor, w_format=#int8_tensor, static=true}; fuse-linear; fold-constants; "
    "dead-code; to-kernels"
)


SHARDED = """func @m(%x: f32[s0, 16]) -> (f32[s0, 16]) where s0 in 1..64 {
  %w1 = core.param() {name = "w1"} : f32[256, 16]
  %w2 = core.param() {name = "w2"} : f32[16, 256]
  %g = aten.linear(%x, %w1) : f32[s0, 256]
  %y = aten.linear(%g, %w2) : f32[s0, 16]
  return %y
}"""
TWO = qcompiler.simulated_mesh(tp=2)


@cache
def _artefact() -> Folder:
    """A small artefact with every kind of file."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU()).eval()
    path = folder() / "artefacts" / "model"
    path.parent.mkdir(exist_ok=True)
    qcompiler.compile(model, pipeline=PASSES, calibration=[torch.randn(4, 16)]).save(path)
    return Folder.at(path)


@cache
def _ranks() -> Folder:
    """A small artefact with two ranks."""
    graph = qcompiler.Graph.parse(SHARDED)
    graph.weights.update(w1=torch.ones(256, 16), w2=torch.ones(16, 256))
    path = folder() / "artefacts" / "ranks"
    path.parent.mkdir(exist_ok=True)
    qcompiler.compile(graph, mesh=TWO, pipeline="fp8-tile; fuse-linear; fold-constants; to-kernels").save(path)
    return Folder.at(path)


def _load(artefact: Folder, changes: Mapping[str, bytes]) -> None:
    """Loads the artefact with other files in it and accesses everything that is loaded lazily."""
    mesh = TWO if artefact is _ranks() else None
    with artefact.holding(changes):
        try:
            loaded = qcompiler.load(artefact.path, verify=True, mesh=mesh)
            if any(name.startswith("stages/") for name in changes):
                [str(loaded.stages[stage]) for stage in loaded.stages]
            str(loaded.calibration), str(loaded.report), loaded.source
            [rank.graph.weights[name].float().sum() for rank in loaded.ranks for name in rank.graph.weights]
        except ArtefactError as error:
            if error.problem == "the artefact cannot be loaded" and error.__cause__ is not None:
                raise error.__cause__ from None  # an unexpected error: the message asks to report it
            raise


def read_artefact(given: bytes) -> None:
    """An artefact with a file that does not match the manifest."""
    name, data = _artefact().change(given, NAME)
    _load(_artefact(), {name: data})


def read_sealed_artefact(given: bytes) -> None:
    """An artefact with a changed file and a matching manifest."""
    _load_sealed(_artefact(), given)


def read_sealed_ranks(given: bytes) -> None:
    """The same of an artefact with two ranks."""
    _load_sealed(_ranks(), given)


def _load_sealed(artefact: Folder, given: bytes) -> None:
    name, data = artefact.change(given, NAME)
    if name != NAME:
        manifest = json.loads(artefact.files[NAME])
        manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        _load(artefact, {name: data, NAME: render(sealed(manifest)).encode()})
        return
    with suppress(ValueError, TypeError, AttributeError, RecursionError):  # not a manifest at all
        data = render(sealed(json.loads(data))).encode()
    _load(artefact, {name: data})


# Checkpoints

BLOCK_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear", "re:.*up"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False,
                        "group_size": -1, "actorder": "static", "observer": "minmax", "observer_kwargs": {}},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        }
    },
    "ignore": ["lm_head"],
    "sparsity_config": {"format": "dense"},
    "transform_config": {"config_groups": {}},
}  # fmt: skip

FIXED = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
STATIC = {
    **COMPRESSED,
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": FIXED, "input_activations": FIXED},
        "group_1": {"targets": ["re:.*k_proj"], "weights": None, "output_activations": FIXED},
    },
    "kv_cache_scheme": FIXED,
}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "ignore": ["lm_head"]}
FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}


@cache
def _checkpoints() -> Mapping[str, Folder]:
    """Checkpoints of each kind: stored, in several files, and with a declaration in a separate file."""
    codes = torch.linspace(-4, 4, 16 * 8).reshape(16, 8).to(torch.float8_e4m3fn)
    plain = {"norm.weight": torch.ones(8), "lm_head.weight": torch.ones(4, 8, dtype=torch.bfloat16)}
    block = {"up.weight": codes, "up.weight_scale_inv": torch.ones(1, 1)}
    channel = {"up.weight": codes, "up.weight_scale": torch.ones(16, 1)}
    exponents = {"up.weight": codes, "up.weight_scale_inv": torch.full((1, 1), 127, dtype=torch.uint8)}
    one = {"up.weight": codes, "up.weight_scale": torch.ones(1), "up.input_scale": torch.ones(1)}
    static = {**one, "up.weight_zero_point": torch.zeros(1, dtype=torch.int8), "attn.k_scale": torch.ones(1)}
    stack = {"experts.up": codes.reshape(2, 8, 8).clone(), "experts.up_weight_scale": torch.ones(2)}
    top = "quantization_config"
    made: dict[str, tuple[dict[str, dict[str, torch.Tensor]], dict[str, object]]] = {
        "fp8": ({"model.safetensors": plain | block}, {top: BLOCK_FP8}),
        "compressed": ({"model.safetensors": plain | channel}, {top: COMPRESSED}),
        "static": ({"model.safetensors": plain | static}, {top: STATIC}),
        "modelopt": ({"model.safetensors": plain | one | stack}, {top: MODELOPT}),
        "separate": ({"model.safetensors": plain | one}, {}),
        "fbgemm": ({"model.safetensors": plain | channel}, {top: FBGEMM}),
        "sharded": (
            {"model-00001-of-00002.safetensors": plain, "model-00002-of-00002.safetensors": block},
            {top: BLOCK_FP8},
        ),
        "elsewhere": (
            {"model.safetensors": exponents},
            {"text_config": {top: BLOCK_FP8}, "quantize": "w8a8", "transformers_weights": None, "rotation": None},
        ),
    }
    for kind, (files, said) in made.items():
        path = folder() / "checkpoints" / kind
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps({"model_type": "llama", **said}))
        for name, tensors in files.items():
            save_file(tensors, path / name, metadata={"format": "pt"})
        if len(files) > 1:
            places = {tensor: name for name, tensors in files.items() for tensor in tensors}
            index = {"metadata": {"total_size": 1000}, "weight_map": places}
            (path / "model.safetensors.index.json").write_text(json.dumps(index))
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
    (folder() / "checkpoints" / "separate" / "hf_quant_config.json").write_text(json.dumps(said))
    return {kind: Folder.at(folder() / "checkpoints" / kind) for kind in made}


def read_checkpoint(given: bytes) -> None:
    """The checkpoint reader and every tensor."""
    line, _, _ = given.partition(b"/")
    kind = line.decode("utf-8", "replace")
    checkpoint = _checkpoints().get(kind, _checkpoints()["fp8"])
    name, data = checkpoint.change(given.removeprefix(line + b"/"), "config.json")
    with checkpoint.holding({name: data}):
        advice(checkpoint.path)
        found = read(checkpoint.path)
        unread(found.folder, found.config)
        for tensor in found.tensors:
            found.quantized(tensor) if tensor in found.stored else found.tensors[tensor]


def _checkpoint_seeds() -> Iterator[bytes]:
    for kind, checkpoint in _checkpoints().items():
        yield from (kind.encode() + b"/" + seed for seed in checkpoint.seeds())


WORDS = (
    b'"stages/00_captured.qir"', b'"host.py"', b'"../host.py"', b'"format"', b'"files"', b'"leaf"', b'"tuple"', b"null",
    b'{"float": "nan"}', b'{"dtype": "bf16"}', b'"cpu"', b'"cuda:7"', b"%x", b"aten.", b"true", b"-1", b"1e999",
    b'"F8_E4M3"', b'"BF16"', b'"U64"', b'"shape"', b"[0,0]", b'"re:("', b'"block"', b'"8x8"', b'"up.weight"', b"[]",
    b'"compression_config"', b'"quantization_config"', b'"actorder"', b'"rotation"', b'"qcompiler artefact"',
)  # fmt: skip

FOLDER_TARGETS = {
    "artefact": Target(read_artefact, in_order(_artefact().seeds()), WORDS),
    "artefact-sealed": Target(read_sealed_artefact, in_order(_artefact().seeds()), WORDS),
    "artefact-ranks": Target(read_sealed_ranks, in_order(_ranks().seeds()), WORDS),
    "checkpoint": Target(read_checkpoint, in_order(_checkpoint_seeds()), WORDS),
}
