"""The callable that `qcompiler.compile` returns."""

import copy
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import torch

from codegen.gemm import tuner
from codegen.launching import warmup as warming
from qcompiler.compiler.exports import Exports
from qcompiler.compiler.pending import PendingModel
from qcompiler.compiler.sizing import calls_to_plan
from qcompiler.errors import CaptureError, QCompilerError
from qcompiler.program.batches import as_call
from qcompiler.program.program import Program, capturing
from qcompiler.runtime.executable import CompiledModule, HostWeights, check_device, run_host

NO_KERNELS = "The target cpu runs torch's operators; there are no kernels."


class CompiledModel(Exports, CompiledModule):
    """A quantized model; called as the model it came from, for inference only.

    Its state is a `Program`; without example inputs, a `PendingModel` until the first call.
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

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model would answer, from the quantized graph; the first call captures it, if that is still to do.

        No gradients are kept, and autocast is off inside.

        Raises:
            InputError: The arguments are not of the kind that the model was captured for.
        """
        return self._call(args, kwargs)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        program = self._state
        if isinstance(program, PendingModel):
            program = self._compile_now(program, args, kwargs)
        check_device(self.weights, program.device)
        inputs, without = program.signature.bind(args, kwargs)
        return program.signature.unflatten(run_host(program.run, self.weights, inputs), without)

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The inputs of the graph for a call; InputError when they are not of the kind that it was captured for."""
        return list(self.signature.flatten(args, kwargs))

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

    def _captured_by(self, calls: tuple[Any, ...]) -> Program:
        """The program; the first of `calls` captures it, if that is still to do."""
        if isinstance(self._state, PendingModel) and calls:
            return self._compile_now(self._state, *as_call(calls[0], 0))
        return self.program

    def _compile_now(self, pending: PendingModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
        if torch.compiler.is_dynamo_compiling():
            raise CaptureError("the model is not captured yet", fix="Call it once before torch.compile.")
        with capturing:
            if isinstance(self._state, Program):  # another thread was first
                return self._state
            # Asked with the lock in hand: while another thread captures, torch says so in all of them.
            if torch.compiler.is_compiling():
                raise CaptureError("the model is not captured yet", fix="Call it once before torch.export.")
            with pending.settings.progress.showing():
                program = pending.compile((args, kwargs))
            self._enter(program)
            return program

    def train(self, mode: bool = True) -> "CompiledModel":
        """Does nothing: a compiled model is always in evaluation mode, whatever happens to the model around it."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompiledModel":
        """A copy with tensors of its own; stages and report are shared."""
        state = self._state
        twin = memo[id(self)] = type(self)(
            copy.deepcopy(state, memo) if isinstance(state, PendingModel) else state.with_own_weights(memo)
        )
        return twin

    def __copy__(self) -> "CompiledModel":
        """A second handle on the same tensors."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._modules = dict(self._modules)
        if isinstance(self._state, PendingModel):
            twin._state = copy.copy(self._state)
        return twin

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuses to be pickled."""
        raise QCompilerError("a compiled model cannot be pickled", fix="Save it: compiled.save(folder).")

    def extra_repr(self) -> str:
        """One line."""
        said = "not captured yet" if isinstance(self._state, PendingModel) else self.report.summary()
        return f"pipeline='{self.settings.pipeline}', {said}"


def callable_of(state: PendingModel | Program) -> CompiledModel:
    """A compiled model whose forward has the signature and documentation of the original model's.

    A signature belongs to a class, so the model is an instance of a subclass with the same name.
    """
    shown = state.original.forward
    if shown.signature is None:
        return CompiledModel(state)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._call(args, kwargs)

    forward.__signature__ = shown.signature  # type: ignore[attr-defined]
    forward.__doc__ = shown.doc or CompiledModel.forward.__doc__
    members = {"forward": forward, "__module__": CompiledModel.__module__, "__qualname__": CompiledModel.__qualname__}
    kind: type[CompiledModel] = type("CompiledModel", (CompiledModel,), {**members, "__doc__": CompiledModel.__doc__})
    return kind(state)
