"""The rules of the house: the direction of imports, and what every file must or must not contain."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("qcompiler", "passes", "codegen")
OTHER_FOLDERS = ("tests", "benchmarks", "examples", "docs")
LONGEST_FILE = 400

# A module belongs to the floor of its longest prefix here. `qcompiler` alone is the front door.
FLOORS = {
    "qcompiler.errors": 0,
    "qcompiler.entry_points": 0,
    "qcompiler.files": 0,
    "qcompiler.front_door": 0,
    "qcompiler.knobs": 0,
    "qcompiler.text": 0,
    "qcompiler.ir": 1,
    "qcompiler.distributed": 1,
    "qcompiler.numerics": 1,
    "qcompiler.dialects": 2,
    "qcompiler.calibration": 3,
    "qcompiler.capture": 3,
    "qcompiler.interpreter": 3,
    "qcompiler.pass_manager": 3,
    "qcompiler.runtime": 3,
    "qcompiler.testing": 3,
    "passes": 4,
    "codegen": 4,
    "qcompiler.progress": 5,
    "qcompiler.schemes": 5,
    "qcompiler.program": 6,
    "qcompiler.report": 6,
    "qcompiler.artefact": 7,
    "qcompiler.checkpoints": 7,
    "qcompiler.inductor": 7,
    "qcompiler.plugins": 7,
    "qcompiler.decoding": 8,
    "qcompiler.diagnostics": 8,
    "qcompiler.html": 8,
    "qcompiler.compiler": 9,
    "qcompiler.cli": 10,
    "qcompiler.transformers": 10,
    "qcompiler.vllm": 10,
    "qcompiler.__main__": 10,
    "qcompiler": 10,
}

# (module, module imported inside a function): the reason. All other imports are at the top.
LATE_IMPORTS: dict[tuple[str, str], str] = {
    (
        "codegen.mlir.examples",
        "torch._dynamo.source",
    ): "torch._dynamo takes a second, and loading a model needs none of it",
    ("qcompiler.compiler.sharding", "codegen.peer_memory"): "torch can be built without torch.distributed",
    (
        "qcompiler.compiler.sharding",
        "qcompiler.distributed.process_groups",
    ): "torch can be built without torch.distributed",
    ("codegen.peer_memory", "torch.distributed"): "a private module, needed on several GPUs only",
}

# Modules that read the environment, with the reason. All others use `qcompiler.knobs`.
READS_ENVIRONMENT = {"qcompiler.knobs": "it is the one place for it"}


@dataclass(frozen=True)
class Import:
    """One module imported by a statement."""

    target: str
    line: int
    in_function: bool
    for_types_only: bool


@dataclass(frozen=True)
class Module:
    """One file of the three packages."""

    name: str
    path: Path
    tree: ast.Module

    def __str__(self) -> str:
        return self.path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Module]:
    files = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {module_name(path): Module(module_name(path), path, parse(path)) for path in files}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@cache
def tracked() -> tuple[Path, ...]:
    """Files that git tracks, or would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("the tree is not a git checkout")
    return tuple(ROOT / name for name in sorted(listed) if name and (ROOT / name).is_file())


def python_files() -> list[Path]:
    return [*(module.path for module in modules().values()), *other_python_files()]


def other_python_files() -> list[Path]:
    return sorted(path for folder in OTHER_FOLDERS for path in (ROOT / folder).rglob("*.py"))


def imports(module: Module) -> Iterator[Import]:
    """All import statements, including those in functions; `from package import submodule` names the submodule."""

    def walk(node: ast.AST, in_function: bool, types: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, in_function, types)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            for target in sorted({base if (full := f"{base}.{a.name}") not in modules() else full for a in node.names}):
                yield Import(target, node.lineno, in_function, types)
        in_function = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        types = types or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for child in ast.iter_child_nodes(node):
            yield from walk(child, in_function, types)

    yield from walk(module.tree, False, False)


def floor(name: str) -> int | None:
    """The floor of one of our modules; None for other modules; KeyError if the table lacks it."""
    if name.partition(".")[0] not in PACKAGES:
        return None
    if name in FLOORS:
        return FLOORS[name]
    parent = name.rpartition(".")[0]
    if parent in ("", "qcompiler"):
        raise KeyError(name)
    return floor(parent)


def climbs(module: Module) -> Iterator[str]:
    """Each import that points to a higher floor, or sideways between `passes` and `codegen`."""
    here = floor(module.name)
    for wanted in imports(module):
        there = floor(wanted.target)
        if here is None or there is None:
            continue
        sideways = {module.name.partition(".")[0], wanted.target.partition(".")[0]} == {"passes", "codegen"}
        if there > here or sideways:
            yield f"{module}:{wanted.line} (floor {here}) imports {wanted.target} (floor {there})"


def test_every_module_has_a_floor() -> None:
    homeless = []
    for name in modules():
        try:
            floor(name)
        except KeyError:
            homeless.append(name)
    assert not homeless, "add these to FLOORS"


def test_imports_point_down() -> None:
    assert not [found for module in modules().values() for found in climbs(module)]


@pytest.mark.parametrize(
    ("name", "source", "found"),
    [
        ("passes.quantizing.fp8_tile", "from qcompiler.ir import Rule", False),
        ("qcompiler.ir.graph", "from qcompiler.compiler import compile", True),
        ("qcompiler.ir.graph", "def f():\n    import qcompiler", True),
        ("qcompiler.ir.graph", "from qcompiler import errors", False),
        ("passes.lowering.to_kernels", "import codegen.templates.gemm", True),
        ("codegen.host", "import passes", True),
        ("qcompiler.compiler", "import codegen.host, passes.quantizing.fp8_tile, torch", False),
    ],
)
def test_the_floor_test_finds_violations(name: str, source: str, found: bool) -> None:
    module = Module(name, ROOT / (name.replace(".", "/") + ".py"), ast.parse(source))
    assert bool(list(climbs(module))) == found


def circles(imported: Mapping[str, Iterable[str]]) -> Iterator[frozenset[str]]:
    """The sets of modules that import each other, directly or through other modules of the set."""
    edges = [(name, target) for name, targets in imported.items() for target in targets if target != name]
    for component in nx.strongly_connected_components(nx.DiGraph(edges)):
        if len(component) > 1:
            yield frozenset(component)


def test_imports_have_no_circles() -> None:
    """Includes imports for type checkers and inside functions."""
    imported = {
        name: [wanted.target for wanted in imports(module) if wanted.target in modules()]
        for name, module in modules().items()
    }
    assert not [sorted(circle) for circle in circles(imported)], "these modules import each other"


def room(name: str) -> str:
    """The folder of a module below its top-level package, or the module itself if it is not in one."""
    return ".".join(name.split(".")[:2])


def test_rooms_have_no_circles() -> None:
    imported: dict[str, set[str]] = {}
    for name, module in modules().items():
        targets = (wanted.target for wanted in imports(module) if wanted.target in modules())
        imported.setdefault(room(name), set()).update(map(room, targets))
    assert not [sorted(circle) for circle in circles(imported)], "these rooms import each other"


def test_the_circle_test_finds_circles() -> None:
    imported = {"a": ["b"], "b": ["c", "d"], "c": ["a"], "d": ["d"], "e": ["a"]}
    assert [*circles(imported)] == [frozenset("abc")]


def test_the_ground_floor_and_the_ir_are_light() -> None:
    """Floor 0 needs only the standard library, and the IR does not import torch."""
    heavy = []
    for module in modules().values():
        for wanted in imports(module):
            top = wanted.target.partition(".")[0]
            if floor(module.name) == 0 and top not in {*sys.stdlib_module_names, "qcompiler"}:
                heavy.append(f"{module}:{wanted.line} imports {top}")
            if module.name.startswith("qcompiler.ir") and top in ("torch", "triton", "numpy"):
                heavy.append(f"{module}:{wanted.line} imports {top}")
    assert not heavy


def test_imports_are_at_the_top() -> None:
    hidden = {
        (module.name, wanted.target): f"{module}:{wanted.line} imports {wanted.target} inside a function"
        for module in modules().values()
        for wanted in imports(module)
        if wanted.in_function
    }
    assert not [text for key, text in hidden.items() if key not in LATE_IMPORTS], (
        "move them, or give LATE_IMPORTS a reason"
    )
    assert not [key for key in LATE_IMPORTS if key not in hidden], "LATE_IMPORTS lists imports that no longer exist"


def test_only_knobs_reads_the_environment() -> None:
    readers = {
        module.name
        for module in modules().values()
        for node in ast.walk(module.tree)
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"))
        or (isinstance(node, ast.ImportFrom) and any(alias.name in ("environ", "getenv") for alias in node.names))
    }
    assert readers - READS_ENVIRONMENT.keys() == set()


def test_nothing_imports_a_plugin() -> None:
    """Plugins (the objects of our entry points, and modules that only they need) are found by name."""
    offered = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    plugins = {value.rpartition(".")[0] for group in offered.values() for value in group.values()} | {
        "codegen.mlir.iree"
    }

    def inside(name: str) -> bool:
        return any(name == plugin or name.startswith(f"{plugin}.") for plugin in plugins)

    assert plugins == {"qcompiler.plugins", "qcompiler.plugins.explorer", "qcompiler.vllm", "codegen.mlir.iree"}
    assert not [
        f"{module}:{wanted.line} imports {wanted.target}"
        for module in modules().values()
        for wanted in imports(module)
        if inside(wanted.target) and not inside(module.name)
    ]


def test_no_module_names_a_target() -> None:
    """Targets are found by name or by device; `codegen.targets.cuda` is what GPU generations have in common."""
    assert not [
        f"{module}:{wanted.line} imports {wanted.target}"
        for module in modules().values()
        for wanted in imports(module)
        if wanted.target.startswith("codegen.targets.") and wanted.target != "codegen.targets.cuda"
    ]


def test_every_module_has_a_docstring() -> None:
    assert not [str(path.relative_to(ROOT)) for path in python_files() if not ast.get_docstring(parse(path))]


def test_public_functions_and_classes_have_docstrings() -> None:
    bare = [
        f"{module}:{node.lineno} {node.name}"
        for module in modules().values()
        for node in module.tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not bare


def test_no_file_is_long() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in python_files()
    }
    assert not {name: length for name, length in lengths.items() if length > LONGEST_FILE}


def test_files_are_named_by_their_content() -> None:
    vague = {"util", "utils", "common", "helper", "helpers", "misc"}
    assert not [str(module) for module in modules().values() if module.path.stem in vague]


def test_each_pass_has_its_own_file() -> None:
    counts = {
        str(module): sum(
            "Pass" in map(ast.unparse, node.bases) for node in module.tree.body if isinstance(node, ast.ClassDef)
        )
        for module in modules().values()
        if module.name.startswith("passes")
    }
    assert not {name: count for name, count in counts.items() if count > 1}


def test_importing_passes_registers_every_pass() -> None:
    named = {
        module.name
        for module in modules().values()
        if module.name.startswith("passes.")
        and re.search(r"^    name: ClassVar\[str\] = ", module.path.read_text(), re.M)
    }
    assert len(named) > 10
    script = "import passes; from qcompiler.pass_manager.pipeline import PASSES as found"
    command = [sys.executable, "-c", f"{script}; print(*{{step.__module__ for step in found.values()}})"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {*found} == named


def test_every_folder_is_a_package_with_types() -> None:
    """The wheel would silently omit a folder without `__init__.py`."""
    folders = {module.path.parent for module in modules().values()}
    assert not [str(folder.relative_to(ROOT)) for folder in sorted(folders) if not (folder / "__init__.py").is_file()]
    assert not [package for package in PACKAGES if not (ROOT / package / "py.typed").is_file()]


def test_tests_are_not_a_package() -> None:
    """`tests/passes/__init__.py` would hide our own `passes`."""
    assert not [str(path) for path in (ROOT / "tests").rglob("__init__.py")]


def test_nothing_is_left_for_later() -> None:
    marks = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error")) + r")\b")
    assert not list(lines_with(marks, [path for path in tracked() if path.suffix == ".py"]))


def test_files_name_no_machine() -> None:
    """Files contain no paths of the machine they were written on, and no hosts that serve packages."""
    folders = "|".join(("ro" + "ot", "home/[a-z]", "Users/[A-Za-z]", "wo" + "rk/", "opt/[a-z]"))
    hosts = "|".join((r"py" + r"pi\.org", "python" + "hosted", r"download\.py" + "torch"))
    assert not list(lines_with(re.compile(rf"(?<![\w.\-/])/({folders})|{hosts}"), tracked()))


def lines_with(pattern: re.Pattern[str], paths: tuple[Path, ...] | list[Path]) -> Iterator[str]:
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if found := pattern.search(line):
                yield f"{path.relative_to(ROOT)}:{number} has {found[0]!r}"
