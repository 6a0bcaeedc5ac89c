"""Chooses the configuration of a GEMM: the one measured fastest, if there is one, or the estimated one.

`codegen.gemm.tuner` measures on request. Measurements are stored in the folder of compiled kernels, in one file per
device, Triton version and kernel source. They are used by the process that made them and by processes with
QCOMPILER_TUNED set. A file that is damaged, or was made for something else, is ignored with a warning.
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

from codegen import assembler, kernels
from codegen.kernel_cache import use_cache_folder
from codegen.launching import replay
from codegen.targets.cuda import gpu_at
from codegen.templates.gemm import GEMM, GemmConfig, GemmFamily, GemmProblem
from qcompiler import knobs
from qcompiler.errors import CodegenError
from qcompiler.files.replacing import not_replaced, replacing_file

FORMAT = 1
"""File format version."""

_learned: dict[int, dict[GemmProblem, GemmConfig]] = {}
"""Device -> its measurements known to this process."""


def config_for(device: int, problem: GemmProblem) -> GemmConfig:
    """The configuration for a GEMM on a CUDA device; raises CodegenError if none can run it."""
    if replay.state.problems is not None:
        replay.state.problems[problem] = None
    return _config_for(device, problem)


@cache
def _config_for(device: int, problem: GemmProblem) -> GemmConfig:
    family = _family(device)
    found = _measured(device, family).get(problem)
    return family.choose(problem) if found is None or family.why_not(found, problem) is not None else found


def _family(device: int) -> GemmFamily:
    return GEMM.family(gpu_at(torch.device("cuda", device)))


def learn(device: int, found: Mapping[GemmProblem, GemmConfig]) -> Path:
    """Uses these configurations in this process and in processes with QCOMPILER_TUNED set; returns the file."""
    path = file_of(device)
    table = read(path, header_of(device), _family(device)) | _learned.get(device, {}) | dict(found)
    _write(path, header_of(device), table)
    _learned[device] = table
    forget()
    return path


def forget() -> None:
    """Discards cached choices after the measurements have changed."""
    _config_for.cache_clear()
    replay.forget()


def header_of(device: int) -> dict[str, Any]:
    """What a measurement depends on besides the problem: the device, the compiler, the kernels."""
    return {
        "format": FORMAT,
        "device": torch.cuda.get_device_name(device),
        "triton": triton.__version__,
        "assembler": str(assembler.current().version),
        "kernels": _source_hash(),
    }


def file_of(device: int) -> Path:
    """Path of the measurements of a device."""
    header = json.dumps(header_of(device), sort_keys=True)
    return Path(use_cache_folder()) / f"qcompiler-tuned-{hashlib.sha256(header.encode()).hexdigest()[:16]}.json"


def read(path: Path, header: Mapping[str, Any], family: GemmFamily) -> dict[GemmProblem, GemmConfig]:
    """The measurements in a file; empty, with a warning, if it is damaged or has another header."""
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        if whole["header"] != header:
            raise ValueError(f"it was made for {whole['header']}")
        return dict(_entry(each, family) for each in whole["gemms"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        warnings.warn(f"{path} is not used: {type(error).__name__}: {error}. Remove it and tune again.", stacklevel=2)
        return {}


def _measured(device: int, family: GemmFamily) -> dict[GemmProblem, GemmConfig]:
    if device not in _learned:
        _learned[device] = read(file_of(device), header_of(device), family) if knobs.current().tuned else {}
    return _learned[device]


def _entry(entry: Mapping[str, Any], family: GemmFamily) -> tuple[GemmProblem, GemmConfig]:
    """One measurement; raises ValueError for a configuration that does not exist."""
    problem, config = GemmProblem(**entry["problem"]), GemmConfig(**entry["config"])
    if config not in family.configs(problem):
        raise ValueError(f"there is no configuration {config}")
    return problem, config


def _write(path: Path, header: Mapping[str, Any], table: Mapping[GemmProblem, GemmConfig]) -> None:
    """Writes the file atomically."""
    entries = [{"problem": dataclasses.asdict(p), "config": dataclasses.asdict(c)} for p, c in table.items()]
    text = json.dumps({"header": dict(header), "gemms": entries}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise not_replaced(
            CodegenError("the tuned configurations cannot be saved", got=error), error, path, len(text)
        ) from error


@cache
def _source_hash() -> str:
    """Hash of all sources of the kernels."""
    return hash_of(Path(next(iter(kernels.__path__))).glob("*.py"))


def hash_of(files: Iterable[Path]) -> str:
    """Hash of the names and contents of files."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
