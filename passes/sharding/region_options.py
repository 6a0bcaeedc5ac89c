"""The options of passes that look for regions to cut."""

from dataclasses import dataclass

from passes.analyses.layers import EVERYTHING
from passes.analyses.sharding_cuts import LARGE, Cutting
from passes.sharding.on_mesh import AlongAxis
from qcompiler.ir import ALL


@dataclass(frozen=True)
class RegionOptions(AlongAxis):
    """A pass that looks for the regions of `passes.analyses.sharding_regions`.

    Attributes:
        unit: Rows and columns of a weight that must stay together, as a block of its format does; -1: all of them.
        named: Whether layers that are usually not quantized may be, because the user names them.
        gather: Elements of a table of embeddings, or of a linear before an output, from which on its columns are cut
            and the result is gathered; smaller ones are on each rank.
        layers: Patterns over weight names, of which the last match decides; others are whole on each rank.
        stored: Columns that must stay together in a weight that is quantized already, beside its own blocks: the tiles
            of activations; -1: all of them; 0: `unit` holds for such weights, too.
    """

    unit: tuple[int, int] = (1, 1)
    named: bool = False
    gather: int = LARGE
    layers: tuple[str, ...] = EVERYTHING
    stored: int = 0

    def __post_init__(self) -> None:
        """Raises PassError unless the mesh has the axis, and the unit is positive."""
        super().__post_init__()
        if not all(size > 0 or size == ALL for size in self.unit):
            raise self.wrong("unit", list(self.unit), f"positive numbers, or {ALL} for all")
        if self.stored < 0 and self.stored != ALL:
            raise self.wrong("stored", self.stored, f"0 or more, or {ALL} for all")

    @property
    def cutting(self) -> Cutting:
        """How regions are cut."""
        return Cutting(self.ranks, self.unit, self.stored, self.named, self.gather, self.layers)
