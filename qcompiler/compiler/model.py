"""The callable that `qcompiler.compile` returns."""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn, Self, TypeVar

import torch

from codegen.gemm import tuner
from codegen.launching import warmup as warming
from qcompiler.compiler.exports import Exports
from qcompiler.compiler.generation import Generation
from qcompiler.compiler.pending import PendingModel
from qcompiler.compiler.sizing import calls_to_plan
from qcompiler.errors import CaptureError, QCompilerError
from qcompiler.program.batches import Call, as_call
from qcompiler.program.program import Program, capturing
from qcompiler.runtime.executable import CompiledModule, HostWeights, check_device, run_host

Model = TypeVar("Model", bound="CompiledModel")

NO_KERNELS = "The target cpu runs torch's operators; there are no kernels."


class CompiledModel(Exports, Generation, CompiledModule):
    """A quantized model with the call signature of the original model; inference only.

    Its state is a `Program`, or without example inputs a `PendingModel` until the first call.
    """

    def __init__(self, state: PendingModel | Program) -> None:
        """Use `qcompiler.compile`."""
        super().__init__()
        self.training = False
        self._enter(state)

    def _enter(self, state: PendingModel | Program) -> None:
        if isinstance(state, Program):
            self.weights = HostWeights(state.host.weights, state.graph.weights, state.device)
        self._state = state

    @property
    def ranks(self) -> tuple["CompiledModel", ...]:
        """The compiled models of the ranks in this process: all of a simulated mesh, otherwise this one alone."""
        return (self,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the quantized graph; the first call captures the model if it is not captured yet.

        Gradients are not tracked, and autocast is off inside.

        Raises:
            InputError: The arguments do not match the captured signature.
        """
        return self._call(args, kwargs)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        program = self._state
        if isinstance(program, PendingModel):
            program = self._compile_now(program, (args, kwargs))
        if program.host.caches:
            fix = "Use qcompiler.decoder(...), or qcompiler.decoding.step.compiled_step(compiled.program)."
            raise QCompilerError("the compiled graph reads key-value caches, which a call does not pass", fix=fix)
        check_device(self.weights, program.device)
        inputs, without = program.signature.bind(args, kwargs)
        return program.signature.unflatten(run_host(program.run, self.weights, inputs), without)

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Returns the graph inputs for a call; InputError if the arguments do not match the captured signature."""
        return list(self.signature.flatten(args, kwargs))

    def warmup(
        self,
        *calls: Any,
        rows: Iterable[int] | None = None,
        progress: warming.Progress | None = None,
        workers: int | None = None,
        **sizes: int | Iterable[int],
    ) -> warming.Warmup:
        """Compiles in parallel all kernels that the calls would launch, without running the model.

            compiled.warmup()                        # 1, 2, 4, … 8192 rows, within the ranges of the model
            compiled.warmup(rows=[1, 16, 512])       # the last dynamic dimension of the first input; others at minimum
            compiled.warmup(s0=1, s1=range(16, 513, 16))
            compiled.warmup(x, {"input_ids": ids})   # real calls; only their sizes are used

        Args:
            calls: Examples as `calibration` accepts them: a tensor, a tuple of arguments, a dict of arguments by name.
            rows: Numbers of GEMM rows, such as tokens.
            progress: Called with the numbers of finished and requested kernels, and the name of the last one.
            workers: Number of compiler threads; one per core by default.
            sizes: One or several values for each symbol of the graph; every combination is planned.

        Raises:
            InputError: The calls do not match the captured signature, or the model has no such symbol.
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
        self,
        *calls: Any,
        rows: Iterable[int] | None = None,
        progress: tuner.Progress | None = None,
        **sizes: int | Iterable[int],
    ) -> tuner.Tuning:
        """Measures the fastest configuration for each GEMM of the given calls, and uses it from now on.

        The arguments select calls, as for `warmup`. Results are cached on disk for the same device, kernels and Triton
        version; other processes use them if QCOMPILER_TUNED=1 is set. Tuning may change the order of FP32 additions.
        Keep the device otherwise idle.

        Raises:
            InputError, CaptureError, CodegenError: As for `warmup`.
        """
        program = self._captured_by(calls)
        wanted = calls_to_plan(program.signature, calls, rows, sizes)
        if program.device.type != "cuda":
            return tuner.Tuning(note=NO_KERNELS)
        check_device(self.weights, program.device)
        found, note = warming.products_of(partial(program.run, self.weights), wanted, program.device)
        result = tuner.tune(found, program.device, progress, self._each)
        return result if note is None else replace(result, note=note)

    def _each(self, step: Callable[[], str]) -> Sequence[str]:
        """Takes a step on each rank that runs this program, and returns the text of each."""
        return tuner.alone(step)

    def _captured_by(self, calls: tuple[Any, ...]) -> Program:
        """Returns the program; captures the model with the first of `calls` if it is not captured yet."""
        if isinstance(self._state, PendingModel) and calls:
            return self._compile_now(self._state, as_call(calls[0]))
        return self.program

    def compile_now(self, call: Call | None) -> Self:
        """Captures the model, with the arguments of one real call if it needs one, and returns this object."""
        if isinstance(self._state, PendingModel):
            self._compile_now(self._state, call)
        return self

    def _compile_now(self, pending: PendingModel, call: Call | None) -> Program:
        if torch.compiler.is_dynamo_compiling():
            raise CaptureError("the model is not captured yet", fix="Call it once before torch.compile.")
        with capturing:
            if isinstance(self._state, Program):  # another thread was first
                return self._state
            # Check under the lock: while one thread captures, torch reports compiling in all threads.
            if torch.compiler.is_compiling():
                raise CaptureError("the model is not captured yet", fix="Call it once before torch.export.")
            with pending.settings.progress.showing():
                program = self._programs(pending, call)
            self._enter(program)
            return program

    def _programs(self, pending: PendingModel, call: Call | None) -> Program:
        """The program to run; models with several programs keep the others."""
        return pending.compile(call)

    def train(self, mode: bool = True) -> "CompiledModel":
        """Does nothing: a compiled model is always in evaluation mode, whatever the enclosing model does."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompiledModel":
        """Returns a copy with its own tensors; stages and report are shared."""
        state = self._state
        twin = memo[id(self)] = type(self)(
            copy.deepcopy(state, memo) if isinstance(state, PendingModel) else state.with_own_weights(memo)
        )
        return twin

    def __copy__(self) -> "CompiledModel":
        """Returns a second handle on the same tensors."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._modules = dict(self._modules)
        if isinstance(self._state, PendingModel):
            twin._state = copy.copy(self._state)
        return twin

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Raises QCompilerError: compiled models cannot be pickled."""
        raise QCompilerError("a compiled model cannot be pickled", fix="Save it: compiled.save(folder).")

    def extra_repr(self) -> str:
        """Returns a one-line summary."""
        said = "not captured yet" if isinstance(self._state, PendingModel) else self.report.summary()
        return f"pipeline='{self.settings.pipeline}', {said}"


def callable_of(state: PendingModel | Program, base: type[Model], **attributes: Any) -> Model:
    """Returns a compiled model whose forward has the signature and documentation of the original model's forward.

    A signature belongs to a class, so the object is an instance of a subclass of `base` with the same name, and with
    the given class attributes.
    """
    shown = state.original.forward
    members = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__, **attributes}
    if shown.signature is not None:

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return self._call(args, kwargs)

        forward.__signature__ = shown.signature  # type: ignore[attr-defined]
        forward.__doc__ = shown.doc or CompiledModel.forward.__doc__
        members["forward"] = forward
    elif not attributes:
        return base(state)
    kind: type[Model] = type(base.__name__, (base,), members)
    return kind(state)
