"""Collectives of torch in a model: captured, kept in order, and run in each call."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import qcompiler

if not dist.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


class RowParallel(nn.Module):
    """Sums a matmul and a weight over the processes of a group, and a third tensor whose sum is not used."""

    def __init__(self, group: str) -> None:
        super().__init__()
        self.linear = nn.Linear(256, 128)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        self.reduced(x)
        return self.reduced(self.linear(x)) + self.reduced(self.linear.weight).mean()

    def reduced(self, x: Tensor) -> Tensor:
        summed = torch.ops._c10d_functional.all_reduce(x, "sum", self.group)
        waited: Tensor = torch.ops._c10d_functional.wait_tensor(summed)
        return waited


def test_collectives_stay_where_they_are(group: str) -> None:
    torch.manual_seed(0)
    model, x = RowParallel(group).eval(), torch.randn(4, 256)
    fast = qcompiler.compile(model, example_inputs=(x,), scheme="fp8_tile", target="cpu")
    first, *_, last = fast.stages.values()
    called = [[op.name for op in graph.ops() if op.name.startswith("_c10d")] for graph in (first, last)]
    assert called[0] == called[1] == 3 * ["_c10d_functional.all_reduce", "_c10d_functional.wait_tensor"]
    assert not any(graph.is_constant(op.result) for graph in (first, last) for op in graph.ops() if "_c10d" in op.name)
    assert [row.quantized for row in fast.report.rows if row.is_matmul] == [True]
    torch.testing.assert_close(fast(x), model(x), rtol=0.1, atol=0.1)
