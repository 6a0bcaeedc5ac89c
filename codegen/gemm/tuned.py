"""Which configuration runs a product: the one that a measurement found best, where there is one, or the estimated one.

Measurements come from `codegen.gemm.tuner`, when somebody asks for them. They are kept on disk, in the folder of
compiled kernels, in a file for each device, version of Triton and source of the kernels, and are used by the process
that made them and by those that QCOMPILER_TUNED tells to. A file that is damaged, or was made for something else, is
left alone with a warning.
"""

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

from codegen import kernels
from codegen.kernel_cache import use_cache_folder
from codegen.launching import replay
from codegen.targets.hopper import HOPPER
from codegen.templates.gemm import GemmConfig, GemmProblem
from qcompiler import knobs
from qcompiler.errors import CodegenError
from qcompiler.files.replacing import not_replaced, replacing_file

FORMAT = 1
"""Of the file."""

_learned: dict[int, dict[GemmProblem, GemmConfig]] = {}
"""Device -> what was measured on it, as far as this process knows."""


def config_for(device: int, problem: GemmProblem) -> GemmConfig:
    """The configuration for a product on a CUDA device; CodegenError where none can run it."""
    if replay.state.problems is not None:
        replay.state.problems[problem] = None
    return _config_for(device, problem)


@cache
def _config_for(device: int, problem: GemmProblem) -> GemmConfig:
    found = _measured(device).get(problem)
    if found is None or HOPPER.gemm.why_not(found, problem) is not None:
        return HOPPER.gemm.choose(problem)
    return found


def learn(device: int, found: Mapping[GemmProblem, GemmConfig]) -> Path:
    """Uses these configurations from now on, in this process and in those that QCOMPILER_TUNED tells to; the file."""
    path = file_of(device)
    table = read(path, header_of(device)) | _learned.get(device, {}) | dict(found)
    _write(path, header_of(device), table)
    _learned[device] = table
    forget()
    return path


def forget() -> None:
    """Chooses anew: what is known of configurations has changed."""
    _config_for.cache_clear()
    replay.forget()


def header_of(device: int) -> dict[str, Any]:
    """What a measurement is of, beside the problem: the device, the compiler, the kernels."""
    return {
        "format": FORMAT,
        "device": torch.cuda.get_device_name(device),
        "triton": triton.__version__,
        "kernels": _source_hash(),
    }


def file_of(device: int) -> Path:
    """Where the measurements of a device are kept."""
    header = json.dumps(header_of(device), sort_keys=True)
    return Path(use_cache_folder()) / f"qcompiler-tuned-{hashlib.sha256(header.encode()).hexdigest()[:16]}.json"


def read(path: Path, header: Mapping[str, Any]) -> dict[GemmProblem, GemmConfig]:
    """The measurements in a file; none, and a warning, where it is damaged or has another header."""
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        if whole["header"] != header:
            raise ValueError(f"it was made for {whole['header']}")
        return dict(_entry(each) for each in whole["products"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        warnings.warn(f"{path} is not used: {type(error).__name__}: {error}. Remove it, and tune again.", stacklevel=2)
        return {}


def _measured(device: int) -> dict[GemmProblem, GemmConfig]:
    if device not in _learned:
        _learned[device] = read(file_of(device), header_of(device)) if knobs.current().tuned else {}
    return _learned[device]


def _entry(entry: Mapping[str, Any]) -> tuple[GemmProblem, GemmConfig]:
    """One measurement; ValueError for a configuration that there is not."""
    problem, config = GemmProblem(**entry["problem"]), GemmConfig(**entry["config"])
    if config not in HOPPER.gemm.configs(problem):
        raise ValueError(f"there is no configuration {config}")
    return problem, config


def _write(path: Path, header: Mapping[str, Any], table: Mapping[GemmProblem, GemmConfig]) -> None:
    """Writes the file in one step, so that no reader sees half of it."""
    entries = [{"problem": dataclasses.asdict(p), "config": dataclasses.asdict(c)} for p, c in table.items()]
    text = json.dumps({"header": dict(header), "products": entries}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise not_replaced(CodegenError("the tuned configurations cannot be saved", got=error), error, path,
                           len(text)) from error  # fmt: skip


@cache
def _source_hash() -> str:
    """Of all that the kernels are made from."""
    return hash_of(Path(next(iter(kernels.__path__))).glob("*.py"))


def hash_of(files: Iterable[Path]) -> str:
    """Of the names and the contents of files."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
