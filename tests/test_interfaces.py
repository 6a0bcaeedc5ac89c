"""Every name of torch, Triton and transformers that the packages use exists in the installed version.

Private names change between releases without notice. The test resolves all of them at once, including names that only a
GPU or a rare model reaches, so run it first with a new version. Names that a module looks up with `hasattr` or
`getattr` may be missing.
"""

import ast
import importlib
import inspect
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from triton.backends.nvidia import driver

from codegen.launching import enqueue

ROOT = Path(__file__).parents[1]
PACKAGES = ("qcompiler", "passes", "codegen")
LIBRARIES = ("torch", "triton", "transformers")
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
# Absent from builds of torch without CUDA.
CUDA_ONLY = ("torch._C._cuda_getCurrentRawStream", "torch._C._cuda_getDevice")


@cache
def resolve(path: str) -> Any:
    """The module, class or function with that dotted name; AttributeError or ImportError if it does not exist."""
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError as error:
            if not (error.name and path.startswith(error.name)):
                raise
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(path)


def used_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Each name of a library that a module imports or reads through an import, fully qualified, and its line."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                if top in LIBRARIES:
                    known[alias.asname or top] = alias.name if alias.asname else top
                    yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in LIBRARIES:
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield f"{node.module}.{alias.name}", node.lineno
    for node in _unguarded(tree):
        if isinstance(node, ast.Attribute) and (chain := _chain(node)) and chain[0] in known:
            yield ".".join([known[chain[0]], *chain[1:]]), node.lineno


def _unguarded(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes except those under a `hasattr` condition and the inner parts of attribute chains."""
    if isinstance(node, ast.If | ast.IfExp) and "hasattr(" in ast.unparse(node.test):
        return
    yield node
    if not (isinstance(node, ast.Attribute) and _chain(node)):
        for child in ast.iter_child_nodes(node):
            yield from _unguarded(child)


def _chain(node: ast.Attribute) -> list[str] | None:
    """The parts of `a.b.c`; None if it does not begin with a name."""
    inner: ast.expr = node
    parts: list[str] = []
    while isinstance(inner, ast.Attribute):
        parts.append(inner.attr)
        inner = inner.value
    return [inner.id, *reversed(parts)] if isinstance(inner, ast.Name) else None


def missing(source: str, libraries: Sequence[str] = LIBRARIES) -> list[str]:
    """The missing library names that a module uses, with their lines."""
    absent = [] if torch.version.cuda else CUDA_ONLY
    found = []
    for name, line in used_names(ast.parse(source)):
        try:
            if name not in absent and name.partition(".")[0] in libraries:
                resolve(name)
        except (AttributeError, ImportError) as error:
            found.append(f"{line}: {name} ({error})")
    return found


def gone(libraries: Sequence[str] = LIBRARIES) -> list[str]:
    """The missing names of these libraries that the packages use, with file and line."""
    return [
        f"{path.relative_to(ROOT)}:{each}" for path in SOURCES for each in missing(path.read_text("utf-8"), libraries)
    ]


def test_all_names_that_the_packages_use_exist() -> None:
    for module in ("codegen.torch_ops", "qcompiler.capture"):
        importlib.import_module(module)  # registers operators of torch.ops.qcompiler
    assert not gone()


def test_a_missing_name_is_found() -> None:
    source = (
        "import torch\nfrom torch import _C as c, nothing\nx = torch.nn.Nothing.more\nc._none\n"
        "y = torch.gone if hasattr(torch, 'gone') else torch.relu\nfrom torch.utils import _pytree\n_pytree.tree_map"
    )
    assert [each.partition(" ")[2].partition(" ")[0] for each in missing(source)] == [
        "torch.nothing",
        "torch.nn.Nothing.more",
        "torch._C._none",
    ]


def test_the_c_launch_function_has_a_known_signature() -> None:
    """`enqueue.Kernel` passes these arguments; an unknown signature needs another branch there."""
    if hasattr(driver, "_BASE_ARGS_FORMAT"):
        assert driver._BASE_ARGS_FORMAT == "iiiKKppOOOOOO"
        listed = False
    else:
        text = Path(driver.__file__).with_name("driver.c").read_text(encoding="utf-8")
        assert '"iiiKKpp(iii)OOOOOOy*O"' in text
        listed = True
    source = inspect.getsource(driver.CudaLauncher.__init__)
    switches = ("launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size", "launch")
    assert [name for name in switches if f"self.{name} =" not in source] == []
    assert ("self.kernel_signature =" in source) == ("self.arg_annotations =" in source) == listed


def test_the_c_launch_function_is_found_in_the_wrapper_of_triton() -> None:
    signature = {0: "tensordesc<fp8e4nv[64, 128]>", 1: "i32"}
    given: list[Any] = [signature, [{"block_size": [64, 128]}]]
    wrapped = driver.wrap_handle_tensordesc(len, *given)
    assert wrapped is not len and enqueue._builtin(wrapped) is len
    assert len(inspect.signature(driver.make_tensordesc_arg).parameters) in (2, 3)
