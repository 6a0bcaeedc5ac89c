"""The interface of kernel templates, and the choice among the templates that run one operation.

    GEMM = KernelOp("GEMM")                          an operation, in the file of its problems and operands
    GEMM.add(WarpGemm, measured, on="sm_90a")        a template, and its measured times; at the end of its file

    family = GEMM.family(target)                     its templates on a target
    family.choose(problem)                           the configuration with the least estimated time
    family.calls(config, operands)                   its kernel calls: launched, timed, or compiled ahead of time

Problems, configurations, and times depend only on sizes, so choices can be tested and explained without a GPU.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

from codegen.launching.launch import KernelCall, launch
from codegen.launching.recent import Recent
from codegen.launching.replay import state
from codegen.templates.limits import Limits, driver_overlaps
from qcompiler.entry_points import import_modules
from qcompiler.errors import CodegenError


class Configuration(Protocol):
    """The parameters of a template: frozen, hashable, printed in reports."""

    @property
    def variant(self) -> str:
        """The name of the template."""


class Gpu(Protocol):
    """What templates know of a target: the name under which their times were measured, and its limits."""

    @property
    def name(self) -> str:
        """The name of the target."""

    @property
    def limits(self) -> Limits:
        """The limits of its multiprocessors and its copy engine."""


Config = TypeVar("Config", bound=Configuration)
Problem = TypeVar("Problem", bound=Hashable)
Operands = TypeVar("Operands")


class Template(ABC, Generic[Config, Problem, Operands]):
    """One kernel variant on one target.

    Attributes:
        variant: Its name, which its configurations have, too.
        overlaps: Its kernels follow the rules of `codegen.kernels.overlap`.
    """

    variant: ClassVar[str]
    overlaps: ClassVar[bool] = False

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.limits = gpu, gpu.limits

    def why_not(self, config: Config, problem: Problem) -> str | None:
        """Why `config` cannot run `problem`, in one sentence without a final period, or None if it can."""
        return None

    def time(self, config: Config, problem: Problem, pace: Any) -> float:
        """Estimated microseconds at the measured `pace`; 0 if each problem has one configuration."""
        return 0.0

    def also(self, config: Config) -> Sequence[Config]:
        """Configurations that calls with other sizes may launch besides this one; a warm-up compiles these, too."""
        return ()

    @abstractmethod
    def calls(self, config: Config, operands: Operands) -> Sequence[KernelCall]:
        """The kernel calls in order; allocates scratch memory. Operands may be without data (device "meta")."""


class Family(Generic[Config, Problem, Operands]):
    """The templates that run one operation on one target.

    Args:
        name: The operation's name in messages.
        templates: Variant -> template.
        paces: Returns the measured configurations for problems of a kind, with their paces.
    """

    def __init__(
        self,
        name: str,
        templates: Mapping[str, Template[Any, Problem, Operands]],
        paces: Callable[[Problem], Mapping[Config, Any]],
    ) -> None:
        self._name, self._templates, self._paces = name, templates, paces
        self._chosen: Recent[Config] = Recent(4096)

    def configs(self, problem: Problem) -> tuple[Config, ...]:
        """Every available configuration for a problem of this kind; compiled ahead of time and tested."""
        return tuple(self._paces(problem))

    def template(self, config: Config) -> Template[Any, Problem, Operands]:
        """The template of a configuration."""
        return self._templates[config.variant]

    def why_not(self, config: Config, problem: Problem) -> str | None:
        """Why `config` cannot run `problem`, in one sentence without a final period, or None if it can."""
        return self.template(config).why_not(config, problem)

    def time(self, config: Config, problem: Problem) -> float:
        """Estimated microseconds of a configuration of `configs`."""
        return self.template(config).time(config, problem, self._paces(problem)[config])

    def choose(self, problem: Problem) -> Config:
        """The configuration with the least estimated time among those that can run the problem.

        Raises:
            CodegenError: No configuration can; the message has each one's reason.
        """
        if (known := self._chosen.get(problem)) is not None:
            return known
        paces = self._paces(problem)
        refusals = {config: self.why_not(config, problem) for config in paces}
        possible = [config for config, why in refusals.items() if why is None]
        if not possible:
            reasons = "; ".join(f"{config}: {why}" for config, why in refusals.items())
            message = f"no kernel configuration can run this {self._name}"
            fix = f"Refused: {reasons}." if reasons else "The target has no template for it."
            raise CodegenError(message, got=problem, fix=fix)
        best = min(possible, key=lambda config: self.template(config).time(config, problem, paces[config]))
        self._chosen.put(problem, best)
        return best

    def calls(self, config: Config, operands: Operands) -> Sequence[KernelCall]:
        """The kernel calls of a configuration for operands that it supports; nothing is checked."""
        template = self.template(config)
        calls = template.calls(config, operands)
        if not (template.overlaps and template.limits.overlap and driver_overlaps()):
            return calls
        return [KernelCall(*call[:-1], {**call.options, "launch_pdl": True}) for call in calls]

    def launch(self, config: Config, operands: Operands) -> None:
        """Launches the calls on the current CUDA stream."""
        also = () if state.planner is None else self.template(config).also(config)
        for each in (config, *also):
            for call in self.calls(each, operands):
                launch(call)


Paces = Callable[[Problem], Mapping[Config, Any]]
"""Returns the configurations of a template for problems of a kind, with their measured paces."""


class _Entry(NamedTuple):
    template: type[Template[Any, Any, Any]]
    paces: Paces[Any, Any]
    target: str | None


class KernelOp(Generic[Config, Problem, Operands]):
    """An operation that GPU kernels run; its templates register themselves.

    Args:
        name: The operation's name in messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._entries: list[_Entry] = []
        self._families: dict[str, Family[Config, Problem, Operands]] = {}

    def add(
        self,
        template: type[Template[Any, Problem, Operands]],
        paces: Callable[[Problem], Mapping[Any, Any]],
        on: str | None = None,
    ) -> None:
        """Adds a template with the configurations that were measured on the target `on`; None: that need no times."""
        self._entries.append(_Entry(template, paces, on))
        self._families.clear()

    def family(self, gpu: Gpu) -> Family[Config, Problem, Operands]:
        """The templates that can run on a target, and their measured times there."""
        found = self._families.get(gpu.name)
        if found is None:
            import_modules("codegen.templates")
            entries = [entry for entry in self._entries if entry.target in (None, gpu.name)]
            templates = {entry.template.variant: entry.template(gpu) for entry in entries}

            def paces(problem: Problem) -> dict[Config, Any]:
                return {config: pace for entry in entries for config, pace in entry.paces(problem).items()}

            found = self._families[gpu.name] = Family(self._name, templates, paces)
        return found


Rule = tuple[bool, str]
"""Whether a rule is broken, and the sentence that reports it."""


def first_broken(rules: Iterable[Rule]) -> str | None:
    """The sentence of the first broken rule."""
    return next((sentence for broken, sentence in rules if broken), None)


def ceil_div(size: int, by: int) -> int:
    """How many parts of `by` cover `size`."""
    return -(-size // by)


def next_power_of_2(size: int) -> int:
    """The smallest power of two that is not less than `size`, as tiles need."""
    return 1 << (size - 1).bit_length()
