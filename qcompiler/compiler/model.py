"""The callable that `qcompiler.compile` returns."""

import copy
import os
import weakref
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from codegen.gemm import tuner
from codegen.launching import warmup as warming
from codegen.mlir import MlirModule, to_mlir
from codegen.mlir.iree import IreeModel
from codegen.mlir.iree import build as build_iree
from codegen.mlir.iree import load as load_iree
from qcompiler.artefact.saving import write_artefact
from qcompiler.artefact.weight_files import SHARD_BYTES
from qcompiler.calibration import Calibration
from qcompiler.capture.preflight import check_model
from qcompiler.capture.signature import Signature
from qcompiler.checkpoints.writing import write
from qcompiler.compiler.batches import as_call
from qcompiler.compiler.forward import forward_of
from qcompiler.compiler.program import Program, Settings, build_program, capture_model, capturing
from qcompiler.compiler.sizing import calls_to_plan
from qcompiler.dialects.aten import torch_dtype
from qcompiler.errors import CaptureError, QCompilerError
from qcompiler.html import html_report, write_page
from qcompiler.ir import Graph, TensorType, Value
from qcompiler.pass_manager import Pipeline
from qcompiler.pass_runner import Stages, Step
from qcompiler.report import Report
from qcompiler.runtime.executable import CompiledModule, HostWeights, check_device, run_host
from qcompiler.runtime.weights import Weights

if TYPE_CHECKING:
    from qcompiler.attribution import ErrorReport

NO_KERNELS = "The target cpu runs torch's operators; there are no kernels."


class CompiledModel(CompiledModule):
    """A quantized model; called as the model it came from, for inference only.

    Attributes:
        graph: The graph after the last pass, with the weights.
        stages: "captured", then the graph after each pass, by the pass's name. Structure only.
        steps: The passes that ran: how long each took, and whether it changed the graph.
        report: One row for each reader of weights: quantized, or why not.
        source: The generated host module.
        calibration: What was seen of the captured graph's values; None where the scheme needs no calibration.
    """

    def __init__(
        self, settings: Settings, *, pending: torch.nn.Module | None = None, origin: Callable[[], Any] | None = None,
        config: Any = None,
    ) -> None:  # fmt: skip
        """Use `qcompiler.compile`."""
        super().__init__()
        self._origin = origin
        self._pending = (pending,)  # in a tuple, so as not to become a sub-module
        self._settings = settings
        self._config = config  # for a loaded model, a function that makes it: transformers takes a second to import
        self._program: Program | None = None
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model would answer, from the quantized graph; the first call captures it, if that is still to do.

        No gradients are kept, and autocast is off inside.

        Raises:
            InputError: The arguments are not of the kind that the model was captured for.
        """
        return self._call(args, kwargs)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        program = self._program
        if program is None:
            program = self._compile_now(args, kwargs)
        check_device(self.weights, program.device)
        inputs, without = program.signature.bind(args, kwargs)
        return program.signature.unflatten(run_host(program.run, self.weights, inputs), without)

    @property
    def graph(self) -> Graph:
        """The graph after the last pass, with the weights."""
        return self._done.graph

    @property
    def stages(self) -> Stages:
        """The graph as captured and after each pass, by name, in order."""
        return self._done.stages

    @property
    def steps(self) -> tuple[Step, ...]:
        """The passes that ran: spec, effect, whether it changed the graph, and how long it took."""
        return self._done.steps

    @property
    def report(self) -> Report:
        """What was quantized, and why the rest was not."""
        return self._done.report

    @property
    def left_alone(self) -> Mapping[str, Mapping[str, str]]:
        """Stage -> name of a value -> why that pass left what computes it alone."""
        return self._done.left_alone

    @property
    def source(self) -> str:
        """The text of the host module."""
        return self._done.host.source

    @property
    def calibration(self) -> Calibration | None:
        """What was seen of the captured graph's values on real calls, to look at, save, and give to `compile` again."""
        known = self._done.calibration
        return known() if callable(known) else known

    @property
    def pipeline(self) -> Pipeline:
        """The passes that ran, or will run; PassError when one of a loaded model's is not installed here."""
        return self._settings.passes

    @property
    def settings(self) -> Settings:
        """How it was compiled."""
        return self._settings

    @property
    def origin(self) -> Any:
        """The model that was compiled, read again where it came from a folder; None when nobody holds it any more."""
        return self._pending[0] or (self._origin() if self._origin is not None else None)

    @property
    def config(self) -> Any:
        """The original model's configuration, as transformers' models have one; AttributeError without one."""
        if isinstance(self._config, partial):
            self._config = self._config()
        if self._config is None:
            raise AttributeError("the model that was compiled has no config")
        return self._config

    @property
    def device(self) -> torch.device:
        """The device that it was compiled for and runs on."""
        return self._done.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type that the model computes in: that of its first floating-point result."""
        kinds = (value.type for value in self._done.graph.outputs if isinstance(value, Value))
        dtypes = (torch_dtype(kind.dtype) for kind in kinds if isinstance(kind, TensorType))
        return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.get_default_dtype())

    @property
    def signature(self) -> Signature:
        """How it is called: its arguments as the graph takes them, and the sizes that they may have."""
        return self._done.signature

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The inputs of the graph for a call; InputError when they are not of the kind that it was captured for."""
        return list(self._done.signature.flatten(args, kwargs))

    def to_html(self, path: "str | os.PathLike[str]", attribution: "ErrorReport | None" = None) -> None:
        """Writes the report as one HTML file that needs nothing else: see `qcompiler.html`.

        Args:
            path: Written whole or not at all.
            attribution: What `qcompiler.attribute_error` found, to be shown, too.

        Raises:
            CaptureError: The model is not captured yet.
            InputError: The file cannot be written.
        """
        write_page(path, html_report(self, attribution))

    def warmup(
        self, *calls: Any, rows: Iterable[int] | None = None, progress: warming.Progress | None = None,
        workers: int | None = None, **sizes: int | Iterable[int],
    ) -> warming.Warmup:  # fmt: skip
        """Compiles the kernels that calls would launch, all at one time, without computing anything.

            compiled.warmup()                        # for 1, 2, 4, … 8192 rows, as far as the model can have them
            compiled.warmup(rows=[1, 16, 512])       # tokens: the last free size of the first input; others least
            compiled.warmup(s0=1, s1=range(16, 513, 16))
            compiled.warmup(x, {"input_ids": ids})   # real calls, of which only the sizes matter

        Args:
            calls: Examples as `calibration` takes them: a tensor, a tuple of arguments, a dict of arguments by name.
            rows: Numbers of rows of the products.
            progress: Called with the numbers of kernels done and wanted, and the name of the last one.
            workers: Threads that compile; left out, one for each core.
            sizes: Values of the graph's symbols, one or several each; every combination of them is looked at.

        Raises:
            InputError: Such calls are not what the model was captured for, or it has no such symbol.
            CaptureError: The model is not captured yet, and there is no call to capture it with.
            CodegenError: A kernel does not compile.
        """
        program = self._captured_by(calls)
        wanted = calls_to_plan(program.signature, calls, rows, sizes)
        if program.device.type != "cuda":
            return warming.Warmup(calls=len(wanted), note=NO_KERNELS)
        check_device(self.weights, program.device)
        return warming.warm_up(partial(program.run, self.weights), wanted, program.device, progress, workers)

    def tune(
        self, *calls: Any, rows: Iterable[int] | None = None, progress: tuner.Progress | None = None,
        **sizes: int | Iterable[int],
    ) -> tuner.Tuning:  # fmt: skip
        """Measures which configuration runs each product of such calls fastest, and uses those from now on.

        The arguments say which calls, as for `warmup`. What is found is kept on disk for the same device, kernels and
        version of Triton; other processes use it when QCOMPILER_TUNED=1 tells them to. Results may then differ in the
        order of FP32 additions. The device should have nothing else to do.

        Raises:
            InputError: As `warmup` does; so for CaptureError and CodegenError.
        """
        program = self._captured_by(calls)
        wanted = calls_to_plan(program.signature, calls, rows, sizes)
        if program.device.type != "cuda":
            return tuner.Tuning(note=NO_KERNELS)
        check_device(self.weights, program.device)
        found, note = warming.products_of(partial(program.run, self.weights), wanted, program.device)
        result = tuner.tune(found, program.device, progress)
        return result if note is None else replace(result, note=note)

    def save(self, folder: str | os.PathLike[str], *, shard_bytes: int = SHARD_BYTES) -> None:
        """Writes the model to a folder that `qcompiler.load` reads: texts, weights in safetensors, no pickle.

        A model that was saved there before is replaced, all of it or not at all. Buffers are saved with the state that
        calls have left them in.

        Args:
            folder: Its name is free, or that of an artefact.
            shard_bytes: Weights beyond so many bytes go into several files.

        Raises:
            ArtefactError: The folder is something else, cannot be written, or the model has something that cannot be
                saved, such as results of a class without a name.
            CaptureError: The model is not captured yet.
        """
        config = getattr(self, "config", None)
        write_artefact(folder, self._done, self._settings, forward_of(type(self)), config, shard_bytes)

    def save_checkpoint(self, folder: str | os.PathLike[str], format: str, **options: Any) -> None:
        """Writes a checkpoint of the ecosystem: "fp8", "compressed-tensors" or "float"; see `checkpoints.write`.

        Raises:
            QCompilerError: The format cannot hold some layers, and which; or the folder is something else.
        """
        write(self, folder, format, **options)

    def to_mlir(self, stage: str | None = None, dialect: str = "torch", weights: str = "arguments") -> MlirModule:
        """A stage as a module of MLIR, through torch-mlir, the extra `mlir`.

        Args:
            stage: A name in `stages`; left out, the last.
            dialect: "torch", or "linalg" for linalg on tensors.
            weights: "arguments" of the function, behind the inputs; "resource", in the text; or "elide", left out.

        Raises:
            QCompilerError: torch-mlir is not installed.
            InputError: There is no such dialect, or a weight of the stage is not there any more.
            CodegenError: Some operations have no form there; the message lists all of them.
        """
        graph, store = self._stage(stage)
        return to_mlir(graph, dialect, weights, store=store)

    def to_iree(self, folder: str | os.PathLike[str], stage: str | None = None, cpu: str = "generic") -> IreeModel:
        """A stage compiled by IREE, the extra `iree`, for the CPU: in a folder, and loaded from there.

        Args:
            folder: Where to write; one that was built before is replaced. `codegen.mlir.iree.load` reads it.
            stage: A name in `stages`; left out, the last.
            cpu: "generic" runs on any processor of the kind, "host" is faster and for the likes of this one.

        Raises:
            QCompilerError: torch-mlir or IREE is not installed.
            InputError: The folder cannot be written, or a weight of the stage is not there any more.
            CodegenError: The stage cannot be lowered, or IREE cannot compile it.
        """
        graph, store = self._stage(stage)
        return load_iree(build_iree(graph, folder, store=store, cpu=cpu))

    def _stage(self, stage: str | None) -> tuple[Graph, MutableMapping[str, torch.Tensor]]:
        """A stage, or the last, and its weights: what only earlier ones read is the model's, as long as it is there."""
        if stage is None:
            return self.graph, self.graph.weights
        origin = self.origin  # which may have to be read again
        before = Weights.from_module(origin) if isinstance(origin, torch.nn.Module) else Weights()
        return self.stages[stage], ChainMap(self.graph.weights, before)

    def _captured_by(self, calls: tuple[Any, ...]) -> Program:
        """The program; the first of `calls` captures it, if that is still to do."""
        if self._program is None and calls:
            return self._compile_now(*as_call(calls[0], 0))
        return self._done

    @property
    def _done(self) -> Program:
        if self._program is None:
            raise CaptureError(
                "the model is not captured yet",
                fix="Call it once with real inputs, or give example_inputs to compile().",
            )
        return self._program

    def accept(self, program: Program) -> None:
        """Takes what was compiled for this model, which from then on is captured."""
        self.weights = HostWeights(program.host.weights, program.graph.weights, program.device)
        self._settings = replace(self._settings, instruments=(), calibration=None)  # they may hold a lot
        self._program = program

    def _compile_now(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
        if torch.compiler.is_dynamo_compiling():
            raise CaptureError("the model is not captured yet", fix="Call it once before torch.compile.")
        with capturing:
            if self._program is not None:  # another thread was first
                return self._program
            # Asked with the lock in hand: while another thread captures, torch says so in all of them.
            if torch.compiler.is_compiling():
                raise CaptureError("the model is not captured yet", fix="Call it once before torch.export.")
            (model,) = self._pending
            if model is None:
                raise CaptureError(
                    "compiling failed before, and nobody holds the model any more",
                    fix="Call compile() again with the model.",
                )
            check_model(model)
            with self._settings.progress.showing():
                captured = capture_model(model, args, kwargs, self._settings)
                # While the passes run only the user holds the model, so that its weights can be freed one by one.
                back = weakref.ref(model)
                self._pending, self._origin = (None,), self._origin or back
                del model
                try:
                    program = build_program(captured, self._settings, captured.signature.flatten(args, kwargs))
                except BaseException:
                    self._pending = (back(),)
                    raise
            self.accept(program)
            return program

    def train(self, mode: bool = True) -> "CompiledModel":
        """Does nothing: a compiled model is always in evaluation mode, whatever happens to the model around it."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompiledModel":
        """A copy with tensors of its own; stages and report are shared."""
        twin = memo[id(self)] = type(self)(self._settings, origin=self._origin, config=self._config)
        if self._program is None:
            twin._pending = copy.deepcopy(self._pending, memo)
        else:
            graph = self._program.graph.clone()
            for name, tensor in graph.weights.items():
                graph.weights[name] = copy.deepcopy(tensor, memo)
            twin.accept(replace(self._program, graph=graph))
        return twin

    def __copy__(self) -> "CompiledModel":
        """A second handle on the same tensors."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._modules = dict(self._modules)
        return twin

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuses to be pickled."""
        raise QCompilerError("a compiled model cannot be pickled", fix="Save it: compiled.save(folder).")

    def extra_repr(self) -> str:
        """One line."""
        if self._program is None:
            return f"pipeline='{self._settings.pipeline}', not captured yet"
        return f"pipeline='{self._settings.pipeline}', {self.report.summary()}"
