"""Loading a damaged folder returns the model that was saved, or raises an error that names the file."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import qcompiler
from qcompiler import ArtefactError, CompiledModel, QCompilerError
from qcompiler.artefact.checking import check
from qcompiler.artefact.manifest import sealed

X = torch.ones(3, 128)
STAGES = ("captured", "fp8-tile", "fuse-linear", "fold-constants", "to-kernels")
FILES = (
    "manifest.json", "signature.json", "report.json", "derivations.json", "host.py", "weights.safetensors",
    *(f"stages/{index:02d}_{name}.qir" for index, name in enumerate(STAGES)),
)  # fmt: skip


@pytest.fixture(scope="module")
def fast() -> CompiledModel:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(128, 128)).eval()
    return qcompiler.compile(layer, example_inputs=(torch.randn(2, 128),), pipeline="; ".join(STAGES[1:]))


@pytest.fixture(scope="module")
def saved(fast: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    fast.save(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


def reseal(folder: Path, change: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
    """Edits an artefact as an attacker would: recomputes all sizes and hashes."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["source"] = manifest["files"]["host.py"]["sha256"]
    change(manifest)
    path.write_text(json.dumps(sealed(manifest)))


def edit(folder: Path, name: str, old: str, new: str) -> None:
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new))
    reseal(folder)


def test_the_files_are_these(saved: Path) -> None:
    found = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    assert found == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ArtefactError, match=name):
        qcompiler.load(folder)
    assert name in str(check(folder))


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_off(folder: Path, name: str) -> None:
    os.truncate(folder / name, (folder / name).stat().st_size - 1 - 40 * (name == "manifest.json"))
    with pytest.raises(ArtefactError, match=f"(is cut off|is not JSON): got .*{name}"):
        qcompiler.load(folder)
    assert not check(folder).ok


@pytest.mark.parametrize("name", FILES)
def test_a_file_with_more_behind_it(folder: Path, name: str) -> None:
    with (folder / name).open("ab") as file:
        file.write(b"x")
    with pytest.raises(ArtefactError, match=f"(has grown|is not JSON): got .*{name}"):
        qcompiler.load(folder)


@pytest.mark.parametrize("name", [name for name in FILES if name != "weights.safetensors"])
def test_an_edited_text(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    at = data.index(b"128" if b"128" in data else b"1")
    data[at : at + 1] = b"7"
    (folder / name).write_bytes(data)
    with pytest.raises(ArtefactError, match=f"edited.*{name}"):
        qcompiler.load(folder)


def test_edited_weights_are_found_when_they_are_read_whole(folder: Path) -> None:
    path = folder / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    qcompiler.load(folder)  # does not read them
    with pytest.raises(ArtefactError, match=r"a file of the artefact was edited or damaged.*weights\.safetensors"):
        qcompiler.load(folder, verify=True)
    found = check(folder)
    assert not found.ok and found.files["weights.safetensors"] is not None and found.files["host.py"] is None
    assert "wrong: a file of the artefact was edited or damaged" in str(found)


def test_a_damaged_header_of_weights(folder: Path) -> None:
    path = folder / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[20] ^= 255
    path.write_bytes(data)
    with pytest.raises(ArtefactError, match=r"a file of weights is damaged.*weights\.safetensors"):
        qcompiler.load(folder)


def test_what_is_no_artefact(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"there is no artefact: got .*nothing; need a folder that compiled\.save"):
        qcompiler.load(tmp_path / "nowhere" / "nothing")
    with pytest.raises(ArtefactError, match="there is no artefact"):
        check(tmp_path / "nothing")
    (tmp_path / "other").mkdir()
    with pytest.raises(ArtefactError, match="not an artefact of qcompiler: it has no manifest"):
        qcompiler.load(tmp_path / "other")
    for text in ('{"name": "web app", "icons": []}', "[1, 2]", "3"):
        (tmp_path / "other" / "manifest.json").write_text(text)
        with pytest.raises(ArtefactError, match=r"this is not the manifest of an artefact: got .*other"):
            qcompiler.load(tmp_path / "other")


@pytest.mark.parametrize("text", ["", "{", '{"a": 1, "a": 2}', '{"a": NaN}', "[" * 100_000, '"\xff', "9" * 5000])
def test_what_is_no_json(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtefactError, match=r"(is not JSON|not the manifest of an artefact).*manifest\.json"):
        qcompiler.load(folder)


def test_a_manifest_that_is_too_long_is_not_read(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 300 << 20)
    with pytest.raises(ArtefactError, match=r"a file of the artefact is too long: got 314572800 bytes; need 268435456"):
        qcompiler.load(folder)


def test_a_newer_one(folder: Path) -> None:
    reseal(folder, lambda manifest: manifest.update(version=3, made_by={"qcompiler": "9.0"}, something="else"))
    with pytest.raises(ArtefactError, match=r"is newer than this qcompiler: got format version 3, made by .*9\.0.*need "
                                            r"version 2.*manifest\.json"):  # fmt: skip
        qcompiler.load(folder)


@pytest.mark.parametrize(
    "name", ["../outside.qir", "/etc/passwd", "stages/../../outside.qir", "stages/00_a.qir/..", "x"]
)
def test_no_name_leads_out_of_the_folder(folder: Path, name: str) -> None:
    def escape(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = manifest["files"].pop("stages/00_captured.qir")
        manifest["stages"][0]["file"] = name

    reseal(folder, escape)
    with pytest.raises(
        ArtefactError, match=r"need the name of a file that an artefact has \(in .*manifest\.json, files"
    ):
        qcompiler.load(folder)


def test_a_pipe_in_the_place_of_a_file_is_not_opened(folder: Path) -> None:
    (folder / "host.py").unlink()
    os.mkfifo(folder / "host.py")
    with pytest.raises(ArtefactError, match=r"is not a regular file \(in .*host\.py"):
        qcompiler.load(folder)


def test_a_host_module_that_was_edited_with_care_is_not_executed(folder: Path, fast: CompiledModel) -> None:
    edit(folder, "host.py", "import torch\n", "import torch\nraise SystemExit('executed')\n")
    with pytest.raises(ArtefactError, match=r"differs from what this qcompiler generates from the graph.*host\.py"):
        qcompiler.load(folder)
    assert not check(folder).ok
    loaded = qcompiler.load(folder, regenerate=True)
    assert loaded.source == fast.source and torch.equal(loaded(X), fast(X))


LAST = "stages/04_to-kernels.qir"


def test_a_graph_that_was_edited_with_care(folder: Path) -> None:
    edit(folder, LAST, "[128, 128]", "[128, 64]")
    with pytest.raises(QCompilerError, match=r"(?s)rule V.*\(in .*04_to-kernels\.qir\)"):
        qcompiler.load(folder)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ('aten.from_file("/etc/hostname", false, 4)', "an operator that reads or writes files: got aten.from_file"),
        ('symm_mem.get_remote_tensors(%input, "0")', "neither torch's nor qcompiler's: got symm_mem"),
        ("mine.op(%input)", "(?s)unknown operation 'mine.op'.*import the library that defines it"),
        (
            "aten.no_such_thing(%input)",
            "(?s)unknown operation 'aten.no_such_thing'.*import the library that defines it",
        ),
    ],
)
def test_operators_that_are_not_called(folder: Path, call: str, says: str) -> None:
    edit(folder, LAST, "  return", f"  %hidden = {call} : f32[4]\n  return")
    with pytest.raises(ArtefactError, match=says):
        qcompiler.load(folder)
    assert not check(folder).ok


def test_a_graph_with_other_inputs(folder: Path) -> None:
    edit(folder, LAST, "%input", "%renamed")
    with pytest.raises(ArtefactError, match="the graph is not the one that the signature calls: got inputs renamed"):
        qcompiler.load(folder)


def test_weights_of_another_type(folder: Path) -> None:
    path = folder / "weights.safetensors"
    tensors = load_file(path)
    bias = next(name for name in tensors if name.endswith("bias"))
    save_file({**tensors, bias: tensors[bias].double()}, path)
    reseal(folder)
    with pytest.raises(
        ArtefactError, match=rf"does not have the type that the graph declares: got {bias}: f64\[128\]; need f32\[128\]"
    ):
        qcompiler.load(folder)
    del tensors[bias]
    save_file(tensors, path)
    reseal(folder)
    with pytest.raises(ArtefactError, match=f"a weight is missing: got {bias}: None.*weights.safetensors"):
        qcompiler.load(folder)


def test_weights_that_another_program_has_written(folder: Path, fast: CompiledModel) -> None:
    """In another order, and not aligned: the bits are the same."""
    path = folder / "weights.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "note": "x" * 5})
    reseal(folder)
    loaded = qcompiler.load(folder, verify=True)
    assert torch.equal(loaded(X), fast(X))
    assert all(tensor.data_ptr() % 64 == 0 for tensor in loaded.graph.weights.values())


@pytest.mark.parametrize(
    "path", ["os:system", "subprocess:Popen", "builtins:eval", "antigravity:fly", "transformers:X"]
)
def test_a_class_is_neither_imported_nor_made_because_a_text_names_it(folder: Path, path: str) -> None:
    structure = {"class": {"name": path, "context": None, "children": ["*"]}}
    edit(folder, "signature.json", '"results": "*"', f'"results": {json.dumps(structure)}')
    with pytest.raises(ArtefactError, match=f"of a class that is not known here: got {path}"):
        qcompiler.load(folder)


def mutated(data: bytes, draw: st.DataObject) -> bytes:
    """The same with one thing changed."""
    kind = draw.draw(st.sampled_from(["flip", "cut", "insert", "delete", "repeat"]))
    at = draw.draw(st.integers(0, max(0, len(data) - 1)))
    end = draw.draw(st.integers(at, min(len(data), at + 40)))
    if kind == "flip" and data:
        return data[:at] + bytes([data[at] ^ (1 << draw.draw(st.integers(0, 7)))]) + data[at + 1 :]
    if kind == "insert":
        return data[:at] + draw.draw(st.binary(min_size=1, max_size=20)) + data[at:]
    return {"cut": data[:at], "delete": data[:at] + data[end:]}.get(kind, data[:end] + data[at:])


def outcome(folder: Path, **options: Any) -> CompiledModel | None:
    """The model, or None after an error of the family; anything else that is raised fails the test."""
    try:
        loaded: CompiledModel = qcompiler.load(folder, **options)
        return loaded
    except QCompilerError:
        return None


PATIENT = settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None
)


@PATIENT
@given(st.data())
def test_fuzz_bytes(saved: Path, fast: CompiledModel, tmp_path: Path, data: st.DataObject) -> None:
    """Bytes of any file change: the folder does not load, except unchanged or with other JSON blanks."""
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    path = folder / data.draw(st.sampled_from(FILES))
    before = path.read_bytes()
    path.write_bytes(mutated(before, data))
    loaded = outcome(folder, verify=True)
    if loaded is not None:
        assert torch.equal(loaded(X), fast(X))
        assert path.read_bytes() == before or json.loads(path.read_text()) == json.loads(before)
    assert check(folder).ok == (loaded is not None)


@PATIENT
@given(st.data())
def test_fuzz_files_that_change_places(saved: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    one, other = data.draw(st.lists(st.sampled_from(FILES), min_size=2, max_size=2, unique=True))
    first, second = (folder / one).read_bytes(), (folder / other).read_bytes()
    assume(first != second)
    (folder / one).write_bytes(second)
    (folder / other).write_bytes(first)
    assert outcome(folder) is None


def changed(value: Any, data: st.DataObject) -> Any:
    """A JSON value with something in it replaced, left out, or doubled."""
    junk: st.SearchStrategy[Any] = st.sampled_from(
        [None, True, -1, 0, 10**30, 1.5, "", "x", "s0", [], {}, ["*"], {"tuple": []}]
    )
    if not isinstance(value, dict | list) or not value or data.draw(st.integers(0, 5)) == 0:
        return data.draw(junk)
    if isinstance(value, list):
        index = data.draw(st.integers(0, len(value) - 1))
        how = data.draw(st.sampled_from(["in", "in", "in", "out", "twice"]))
        middle = {"out": [], "twice": [value[index]] * 2}.get(how, [changed(value[index], data)] if how == "in" else [])
        return [*value[:index], *middle, *value[index + 1 :]]
    key = data.draw(st.sampled_from(sorted(value)))
    if data.draw(st.integers(0, 5)) == 0:
        return {name: item for name, item in value.items() if name != key}
    return {**value, key: changed(value[key], data)}


@PATIENT
@given(st.data())
def test_fuzz_values_with_recomputed_hashes(saved: Path, tmp_path: Path, data: st.DataObject) -> None:
    """With correct hashes, each value is checked: loading returns a model or raises our error."""
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    name = data.draw(st.sampled_from(["manifest.json", "signature.json", "report.json", "derivations.json"]))
    value = changed(json.loads((folder / name).read_text()), data)
    if name == "manifest.json":
        (folder / name).write_text(json.dumps(sealed(value) if isinstance(value, dict) else value))
    else:
        (folder / name).write_text(json.dumps(value))
        reseal(folder)
    outcome(folder)
    check(folder)


@PATIENT
@given(st.data())
def test_fuzz_texts_with_recomputed_hashes(saved: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    name = data.draw(st.sampled_from([LAST, LAST, "host.py", "weights.safetensors"]))
    (folder / name).write_bytes(mutated((folder / name).read_bytes(), data))
    reseal(folder)
    outcome(folder)
    check(folder)
