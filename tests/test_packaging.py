"""The installed package: light first import, a complete wheel with three top-level names, and a name-conflict guard."""

import inspect
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

import pytest

import qcompiler

ROOT = Path(__file__).parents[1]
PACKAGES = ("qcompiler", "passes", "codegen")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Modules that can be imported only with an extra -> the packages that they need.
OPTIONAL: dict[str, str] = {
    "qcompiler.plugins.explorer.main": "model_explorer",
    "qcompiler.vllm.config": "vllm",
    "qcompiler.vllm.existing": "vllm",
    "qcompiler.vllm.experts": "vllm",
    "qcompiler.vllm.fusing": "vllm",
    "qcompiler.vllm.linear": "vllm",
    "qcompiler.vllm.operators_config": "vllm",
    "qcompiler.vllm.verifying": "vllm",
}

# Non-Python files in the wheel: the parts of the HTML report.
ASSETS = "qcompiler/html/static"


def sources() -> list[str]:
    """The modules of the three packages, as paths in the tree and in the wheel."""
    return sorted(path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def module_names() -> list[str]:
    return [name.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for name in sources()]


def python(code: str, *path: Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter that searches these folders first."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), **environment}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_importing_qcompiler_is_light(tmp_path: Path) -> None:
    code = (
        "import sys; old = set(sys.modules); import qcompiler; print(*{m.split('.')[0] for m in {*sys.modules} - old})"
    )
    done = python(code, ROOT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "qcompiler" in loaded
    assert loaded <= {"qcompiler", *sys.stdlib_module_names}


# One interpreter imports all third-party modules, which takes seconds. Each of our modules is then imported in a child
# of the process that has imported its package and none of our other modules, as in a first import. If importing the
# package has already imported the module, that was its first import.
FIRST_IMPORTS = """
import gc, importlib, os, sys, traceback
gc.disable()  # a collection in a child would copy the pages of its parent
OURS = {"qcompiler", "passes", "codegen"}
reader, writer = os.pipe()
if os.fork() == 0:
    for name in sys.argv[1:]:
        importlib.import_module(name)
    os.write(writer, " ".join(name for name in sys.modules if name.partition(".")[0] not in OURS).encode())
    os._exit(0)
os.close(writer)
imported = os.fdopen(reader).read().split()
if not imported:
    sys.exit(1)  # the child has printed why
for name in imported:
    try:
        importlib.import_module(name)
    except Exception:
        pass  # known by another name, or only to who made it
assert not {m.partition(".")[0] for m in sys.modules} & OURS

def first_imports(package):
    good = True
    for name in sys.argv[1:]:
        if name.rpartition(".")[0] != package:
            continue
        if name in sys.modules:
            good &= first_imports(name)
            continue
        child = os.fork()
        if child == 0:
            try:
                __import__(name)
            except BaseException:
                print("import", name, "as the first import:", file=sys.stderr)
                traceback.print_exc()
                os._exit(1)
            os._exit(not first_imports(name))
        if os.waitpid(child, 0)[1]:
            print(name, flush=True)
            good = False
    return good

first_imports("")
"""


@pytest.mark.parametrize(
    "name", ["calibration", "checkpoints", "html", "instruments", "numerics", "schemes", "testing"]
)
def test_public_submodules_need_no_separate_import(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts from a package without the submodule as an attribute, as if nothing had imported the submodule yet."""
    monkeypatch.delattr(qcompiler, name, raising=False)
    module = getattr(qcompiler, name)
    assert inspect.ismodule(module) and module.__name__.endswith(f".{name}")


def test_dir_shows_public_names_only() -> None:
    assert dir(qcompiler) == sorted({*qcompiler.__all__, "__version__"})
    assert all(getattr(qcompiler, name) is not None for name in dir(qcompiler))
    assert not [name for name in dir(qcompiler) if name.startswith("_") and name != "__version__"]


def test_the_command_line_runs_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qcompiler", "--version"]
    environment = {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("qcompiler ")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_every_module_can_be_the_first_import(tmp_path: Path) -> None:
    names = [name for name in module_names() if name not in OPTIONAL]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", FIRST_IMPORTS, *names]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [], done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tree so that earlier builds leave nothing in it."""
    tree, out = tmp_path_factory.mktemp("tree") / "qcompiler", tmp_path_factory.mktemp("wheel")
    leave = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=leave)
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-index",
    ]
    command += ["--no-build-isolation", "--wheel-dir", str(out), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("qcompiler-*.whl"))


@pytest.fixture(scope="module")
def contents(wheel: Path) -> Iterator[zipfile.ZipFile]:
    """The wheel, opened."""
    with zipfile.ZipFile(wheel) as archive:
        yield archive


def test_the_wheel_has_three_top_level_names(contents: zipfile.ZipFile) -> None:
    info = f"qcompiler-{PROJECT['version']}.dist-info"
    assert {name.partition("/")[0] for name in contents.namelist()} == {*PACKAGES, info}
    assert contents.read(f"{info}/top_level.txt").decode().split() == sorted(PACKAGES)
    for name in PROJECT["license-files"]:
        assert f"{info}/licenses/{name}" in contents.namelist()


def test_the_wheel_has_all_modules_and_types(contents: zipfile.ZipFile) -> None:
    shipped = sorted(name for name in contents.namelist() if ".dist-info/" not in name)
    assets = [path.relative_to(ROOT).as_posix() for path in (ROOT / ASSETS).rglob("*") if path.is_file()]
    assert shipped == sorted(
        [*sources(), "qcompiler/__init__.pyi", *assets, *(f"{package}/py.typed" for package in PACKAGES)]
    )


def test_the_wheel_has_correct_metadata(contents: zipfile.ZipFile) -> None:
    info = f"qcompiler-{PROJECT['version']}.dist-info"
    metadata = Parser().parsestr(contents.read(f"{info}/METADATA").decode())
    assert (metadata["Name"], metadata["License-Expression"]) == ("qcompiler", "Apache-2.0")
    assert "Private :: Do Not Upload" in (metadata.get_all("Classifier") or [])
    assert contents.read(f"{info}/entry_points.txt").decode().split("\n") == [
        "[console_scripts]", "qcompiler = qcompiler.cli:main", "",
        "[qcompiler.exporters]", "iree = qcompiler.plugins.iree:IreeExporter",
        "model-explorer = qcompiler.plugins.explorer.exporter:ModelExplorer", "",
        "[vllm.general_plugins]", "qcompiler = qcompiler.vllm.plugin:register", "",
    ]  # fmt: skip


def test_the_wheel_works_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
    ]
    done = subprocess.run([*command, "--target", str(site), str(wheel)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    code = (
        "import codegen, passes, qcompiler\n"
        "qcompiler.compile\n"
        "print(qcompiler.__version__, *(m.__file__ for m in (qcompiler, passes, codegen)))"
    )
    done = python(code, site, cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [PROJECT["version"], *(str(site / package / "__init__.py") for package in PACKAGES)]


@pytest.mark.parametrize("package", ["passes", "codegen"])
def test_the_front_door_names_a_conflicting_package(package: str, tmp_path: Path) -> None:
    intruder = tmp_path / "intruder" / package
    intruder.mkdir(parents=True)
    (intruder / "__init__.py").write_text('"""Another package."""\n', encoding="utf-8")
    done = python("import qcompiler; qcompiler.compile", intruder.parent, ROOT, cwd=tmp_path)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: qcompiler ships its own top-level package")
    assert str(intruder) in last
    assert str(ROOT / package) in last
