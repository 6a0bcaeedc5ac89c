"""The interface of kernel templates, and the choice among the templates that run one operation.

    family.choose(problem)                  the configuration with the least estimated time
    family.calls(config, operands)          its kernel calls: launched, warmed up, timed, or compiled ahead of time

Problems, configurations, and times depend only on sizes, so choices can be tested and explained without a GPU.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from codegen.launching.launch import KernelCall, launch
from codegen.launching.recent import Recent
from qcompiler.errors import CodegenError


class Configuration(Protocol):
    """The parameters of a template: frozen, hashable, printed in reports."""

    @property
    def variant(self) -> str:
        """The name of the template."""


Config = TypeVar("Config", bound=Configuration)
Problem = TypeVar("Problem", bound=Hashable)
Operands = TypeVar("Operands")


class Template(ABC, Generic[Config, Problem, Operands]):
    """One kernel variant."""

    @abstractmethod
    def why_not(self, config: Config, problem: Problem) -> str | None:
        """Why `config` cannot run `problem`, in one sentence without a final period, or None if it can."""

    @abstractmethod
    def time(self, config: Config, problem: Problem, pace: Any) -> float:
        """Estimated microseconds at the measured `pace` of the configuration."""

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
        refusals = {config: self.why_not(config, problem) for config in self._paces(problem)}
        possible = [config for config, why in refusals.items() if why is None]
        if not possible:
            reasons = "; ".join(f"{config}: {why}" for config, why in refusals.items())
            message = f"no kernel configuration can run this {self._name}"
            raise CodegenError(message, got=problem, fix=f"Refused: {reasons}.")
        best = min(possible, key=lambda config: self.time(config, problem))
        self._chosen.put(problem, best)
        return best

    def calls(self, config: Config, operands: Operands) -> Sequence[KernelCall]:
        """The kernel calls of a configuration for operands that it supports; nothing is checked."""
        return self.template(config).calls(config, operands)

    def launch(self, config: Config, operands: Operands) -> None:
        """Launches the calls on the current CUDA stream."""
        for call in self._templates[config.variant].calls(config, operands):
            launch(call)


Rule = tuple[bool, str]
"""Whether a rule is broken, and the sentence that reports it."""


def first_broken(rules: Iterable[Rule]) -> str | None:
    """The sentence of the first broken rule."""
    return next((sentence for broken, sentence in rules if broken), None)


def ceil_div(size: int, by: int) -> int:
    """How many parts of `by` cover `size`."""
    return -(-size // by)
