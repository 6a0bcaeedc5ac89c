"""How ranks divide a model: a sequence of named tactics, which prints and parses.

    Sharding.parse("tp")                                             tensor parallelism along the mesh axis "tp"
    Sharding.parse('tp{layers=["*", "!lm_head"]}; sp')               all layers but one; then sequence-parallel norms
    Sharding.parse("tp{axis=inner}; ep{axis=outer}")                 along axes of the mesh with other names

Each tactic is one pass or several, in the order of the text. What an earlier tactic has divided, a later one leaves
alone, and reports why.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from passes.analyses.layers import EVERYTHING
from passes.analyses.sharding_cuts import LARGE
from passes.sharding.expert_parallel import ExpertParallel
from passes.sharding.on_mesh import AlongAxis
from passes.sharding.quantize_sums import QuantizeSums
from passes.sharding.send_chosen import SendChosen
from passes.sharding.sequence_parallel import FEW, SequenceParallel
from passes.sharding.shard import Shard
from passes.sharding.split_linears import SplitLinears
from passes.sharding.split_norms import SplitNorms
from qcompiler.errors import PassError, did_you_mean
from qcompiler.ir import Format, Mesh
from qcompiler.pass_manager.options import DASHED, OptionReader, convert_options, default_of, print_option
from qcompiler.text import Source


@dataclass(frozen=True)
class Blocks:
    """What a pipeline quantizes together.

    Attributes:
        unit: Rows and columns of a weight that no cut may separate.
        stored: Columns of a weight that is quantized already, beside its own blocks; 0 if `unit` holds for it, too.
        named: Whether the user names layers to be quantized.
        reads: The format in which layers quantize what they read, if it is the same for all of them.
        layers: Patterns over the weight names of these layers.
    """

    unit: tuple[int, int] = (1, 1)
    stored: int = 0
    named: bool = False
    reads: Format | None = None
    layers: tuple[str, ...] = EVERYTHING


@dataclass(frozen=True)
class Tactic:
    """One way to divide a model, with its options.

    Attributes:
        name: The name in texts.
        axis: The axis of the mesh.
    """

    name: ClassVar[str]
    axis: str

    def placing(self, mesh: Mesh, blocks: Blocks) -> tuple[AlongAxis, ...]:
        """The passes that place values in the graph of the whole model, if the tactic has any."""
        return ()

    def rewriting(self, mesh: Mesh, rank: int, blocks: Blocks) -> tuple[AlongAxis, ...]:
        """The passes that rewrite what the ranks exchange, if the tactic has any."""
        return ()

    def exchanging(self, mesh: Mesh) -> tuple[AlongAxis, ...]:
        """The passes that run after the rewriting of all tactics, if the tactic has any."""
        return ()

    def sending(self) -> QuantizeSums | None:
        """The pass that changes in which format the program of one rank sends what it exchanges, if there is one."""
        return None

    def __post_init__(self) -> None:
        """Checks the options against their type hints; raises PassError for a wrong value."""
        convert_options(self, f"tactic '{self.name}'")

    def __str__(self) -> str:
        values = [(option, getattr(self, option.name)) for option in fields(self)]
        shown = [f"{option.name}={print_option(value)}" for option, value in values if value != default_of(option)]
        return self.name + (f"{{{', '.join(shown)}}}" if shown else "")


@dataclass(frozen=True)
class TensorParallel(Tactic):
    """Cuts columns of linears and heads of attention; the linears that read them return partial sums.

    Attributes:
        axis: The axis of the mesh.
        layers: Patterns over weight names, of which the last match decides; all others are whole on each rank.
        gather: Minimum elements of an embedding table or a vocabulary projection whose columns are cut and gathered.
    """

    name = "tp"

    axis: str = "tp"
    layers: tuple[str, ...] = EVERYTHING
    gather: int = LARGE

    def placing(self, mesh: Mesh, blocks: Blocks) -> tuple[AlongAxis, ...]:
        """Splits linears and takes norms apart that prevent a cut, then places values in the graph of the model."""
        options = (str(mesh), self.axis, blocks.unit, blocks.named, self.gather, self.layers, blocks.stored)
        return SplitLinears(*options), SplitNorms(*options), Shard(*options)


@dataclass(frozen=True)
class SequenceParallelNorms(Tactic):
    """Cuts tokens between partial sums and the matmuls after them: each rank adds and normalizes its own tokens.

    Attributes:
        axis: The axis of the mesh.
        tokens: Minimum number of tokens of a call that are cut; with fewer, each rank computes all of them.
        sums: The format in which ranks send the terms of sums; by default they send them in the dtype of the model.
            A format loses accuracy.
    """

    name = "sp"

    axis: str = "tp"
    tokens: int = FEW
    sums: Format | None = None

    def __post_init__(self) -> None:
        """Checks the options; raises PassError for a wrong value."""
        super().__post_init__()
        if self.tokens < 1:
            raise PassError("option 'tokens' of tactic 'sp' has a wrong value", got=self.tokens, need="at least 1")

    def rewriting(self, mesh: Mesh, rank: int, blocks: Blocks) -> tuple[AlongAxis, ...]:
        """Rewrites sums over ranks."""
        options = (self.tokens, blocks.reads, blocks.layers, self.sums)
        return (SequenceParallel(str(mesh), self.axis, *options),)

    def sending(self) -> QuantizeSums | None:
        """The pass, which quantizes the terms of sums, if a format is given."""
        return None if self.sums is None else QuantizeSums(self.axis, self.sums)


@dataclass(frozen=True)
class ExpertParallelLayers(Tactic):
    """Divides the experts of a mixture: each rank computes the tokens of its own experts.

    Attributes:
        axis: The axis of the mesh.
        layers: Patterns over weight names, of which the last match decides; all other experts are on each rank.
        send: With "chosen", ranks send a token only to the ranks whose experts it chose, if tokens are cut (`sp`); by
            default all tokens.
    """

    name = "ep"

    axis: str = "tp"
    layers: tuple[str, ...] = EVERYTHING
    send: Literal["all", "chosen"] = "all"

    def rewriting(self, mesh: Mesh, rank: int, blocks: Blocks) -> tuple[AlongAxis, ...]:
        """Cuts the experts."""
        return (ExpertParallel(str(mesh), self.axis, rank, self.layers),)

    def exchanging(self, mesh: Mesh) -> tuple[AlongAxis, ...]:
        """Sends each token only where it is needed, if this is asked for."""
        return (SendChosen(str(mesh), self.axis),) if self.send == "chosen" else ()


KINDS: tuple[type[Tactic], ...] = (TensorParallel, SequenceParallelNorms, ExpertParallelLayers)
TACTICS: Mapping[str, type[Tactic]] = {kind.name: kind for kind in KINDS}
"""Tactics by name."""


@dataclass(frozen=True)
class Sharding:
    """Tactics in the order of their passes. `Sharding.parse(str(sharding)) == sharding`."""

    tactics: tuple[Tactic, ...]

    def __post_init__(self) -> None:
        """Raises PassError if there is no tactic, or one is used twice along an axis."""
        pairs = [(tactic.name, tactic.axis) for tactic in self.tactics]
        if not pairs:
            raise PassError("a sharding needs a tactic", need=f"one of {', '.join(TACTICS)}")
        if twice := [pair for pair in pairs if pairs.count(pair) > 1]:
            raise PassError(f"tactic '{twice[0][0]}' is given twice", got=f"along axis {twice[0][1]!r}", need="once")

    @classmethod
    def parse(cls, text: str) -> "Sharding":
        """Parses `tactic; tactic{option=value}; …`; raises ParseError if malformed, PassError for unknown names."""
        reader = OptionReader(Source(text, "<sharding>"))
        return cls(tuple(reader.separated(lambda: _read(reader), ";")))

    def __str__(self) -> str:
        return "; ".join(map(str, self.tactics))

    def __iter__(self) -> Iterator[Tactic]:
        return iter(self.tactics)

    def check(self, mesh: Mesh) -> None:
        """Raises PassError if a tactic uses an axis that the mesh does not have."""
        names = [name for name, _ in mesh.axes]
        for tactic in self.tactics:
            if tactic.axis not in names:
                fix = f'Name one of the axes of the mesh: "{tactic.name}{{axis={names[0]}}}".'
                problem = f"tactic '{tactic.name}' uses an axis that the mesh does not have"
                raise PassError(problem, got=repr(tactic.axis), need=f"one of {', '.join(names)}", fix=fix)


def _read(reader: OptionReader) -> Tactic:
    """Reads a tactic: `name{option=value, …}`."""
    name = reader.word(DASHED, "the name of a tactic")
    with reader.blaming(name):
        if name.text not in TACTICS:
            raise PassError("no such tactic", got=repr(name.text), fix=did_you_mean(name.text, TACTICS))
        kind = TACTICS[name.text]
    given: dict[str, Any] = reader.options(kind, f"tactic '{kind.name}'", [option.name for option in fields(kind)])
    return kind(**given)
