"""The options of passes for the ranks of a mesh."""

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.errors import PassError, QCompilerError
from qcompiler.ir import Graph, Mesh, Value
from qcompiler.pass_manager.pipeline import Pass


def keep_statistics(graph: Graph, value: Value, total: Value) -> None:
    """Gives the sum of what ranks hold the statistics of the whole value, which calibration has observed."""
    known = graph.calibration
    if known is not None and value.name in known.statistics:
        graph.calibration = known.updated({total.name: known.statistics[value.name]})


@dataclass(frozen=True)
class OnMesh(Pass):
    """A pass for a mesh.

    Attributes:
        mesh: The axes of the mesh and their sizes, such as "tp=2".
    """

    mesh: str

    def __post_init__(self) -> None:
        """Raises PassError unless the mesh is valid."""
        super().__post_init__()
        try:
            self.check_mesh(Mesh.parse(self.mesh))
        except QCompilerError as error:
            raise PassError(f"option 'mesh' of pass '{self.name}' is wrong: {error}") from None

    @property
    def grid(self) -> Mesh:
        """The mesh."""
        return Mesh.parse(self.mesh)

    def check_mesh(self, mesh: Mesh) -> None:
        """Raises QCompilerError if the pass cannot use the mesh."""

    def check_rank(self, rank: int) -> None:
        """Raises PassError unless the mesh has such a rank."""
        if not 0 <= rank < self.grid.size:
            raise self.wrong("rank", rank, f"0 to {self.grid.size - 1}")

    def wrong(self, option: str, got: object, need: str) -> PassError:
        """The error for a wrong value of an option."""
        return PassError(f"option '{option}' of pass '{self.name}' is wrong", got=got, need=need)


@dataclass(frozen=True)
class AlongAxis(OnMesh):
    """A pass for the ranks along one axis of a mesh.

    Attributes:
        absent: Why it changes nothing if it gives no other reason.
        axis: The axis.
    """

    absent: ClassVar[str]

    axis: str = "tp"

    def check_mesh(self, mesh: Mesh) -> None:
        """Raises QCompilerError unless the mesh has the axis."""
        mesh.length(self.axis)

    @property
    def ranks(self) -> int:
        """The number of ranks along the axis."""
        return self.grid.length(self.axis)
