"""Collectives of GPUs of one host, through memory that all of them can address.

NCCL takes 11 us for any small sum, on a stream to which a CUDA graph must switch and back; this takes a third, on the
stream of the model. `ProcessGroups` asks here first. Memory comes from torch's symmetric memory, without multicast.
"""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import Parameter

from codegen.direct import kernels
from codegen.inboxes import Growing, Inboxes, Shared
from codegen.launching.launch import FLOATS
from codegen.launching.replay import state
from codegen.templates.peers import PROGRAMS, memory_bytes
from qcompiler import knobs
from qcompiler.distributed.communicator import Choices

MOST_SENT = 1 << 21
"""Bytes that a rank of more than two may send to others; larger exchanges were measured with two only."""

LARGEST = 1 << 30
"""Bytes that a rank may send to another one: the kernel numbers elements in 32 bits."""

PATIENCE = 600.0
"""Seconds that a rank waits for the others, unless QCOMPILER_COLLECTIVE_SECONDS says otherwise."""


@dataclass(frozen=True)
class Peers:
    """A group of GPUs that write to each other's memory; its exchanges must not overlap on two streams.

    Attributes:
        own: The memory of this rank, which others write to; kept alive here.
        memories: int64 `[ranks]`: the address, on this GPU, of each rank's memory.
        steps: int32 `[PROGRAMS]`: how many steps each program has taken.
        rank: The number of this rank in the group.
        patience: Nanoseconds that a rank waits for the others.
    """

    own: Tensor
    memories: Tensor
    steps: Tensor
    rank: int
    patience: int

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.memories.numel()

    def exchange(self, x: Tensor, *, scattered: bool = False, summed: bool = False) -> Tensor:
        """What the other ranks and this one have sent to it, as `codegen.kernels.peers.exchange` says; contiguous."""
        found: Tensor = kernels.exchange(x, self.memories, self.steps, self.rank, self.patience, scattered, summed)
        return found

    def exchange_chosen(self, x: Tensor, choices: Choices, *, summed: bool = False) -> Tensor:
        """What ranks send of the tokens of experts, as `codegen.kernels.chosen_peers.exchange_chosen` says."""
        rest = (choices.groups, self.rank, self.patience, summed)
        found: Tensor = kernels.exchange_chosen(x, choices.experts.contiguous(), self.memories, self.steps, *rest)
        return found


class PeerMemory:
    """Exchanges tensors within groups of GPUs; a group is connected by its first use outside a CUDA graph.

    A method returns None where NCCL should do it. All ranks make the same calls in the same order, with equal shapes
    and dtypes, and get the same choice, also if only one of them is profiled. Sums are added in FP32 in the order of
    the ranks, and rounded once.
    """

    def __init__(self) -> None:
        self._peers: dict[str, Peers | None] = {}
        self._inboxes: dict[str, Growing] = {}

    def all_reduce(self, x: Tensor, group: dist.ProcessGroup) -> Tensor | None:
        """The sum of the tensors of all ranks."""
        peers = self._peers_for(x, x.nbytes, group) if x.dtype in FLOATS else None
        return None if peers is None else peers.exchange(x.contiguous(), summed=True)

    def all_gather(self, x: Tensor, group: dist.ProcessGroup) -> Tensor | None:
        """The tensors of all ranks, `[ranks, *x.shape]`."""
        if (peers := self._peers_for(x, x.nbytes, group)) is None:
            return None
        return peers.exchange(_as_bytes(x)).view(x.dtype).view(peers.ranks, *x.shape)

    def reduce_scatter(self, x: Tensor, group: dist.ProcessGroup) -> Tensor | None:
        """This rank's part, along the first axis, of the sum."""
        peers = self._peers_for(x, x.nbytes // group.size(), group) if x.dtype in FLOATS else None
        if peers is None:
            return None
        return peers.exchange(x.contiguous().view(peers.ranks, -1, *x.shape[1:]), scattered=True, summed=True)

    def all_to_all(self, x: Tensor, group: dist.ProcessGroup) -> Tensor | None:
        """This rank's parts, along the first axis, of the tensors of all ranks, in the order of the ranks."""
        if (peers := self._peers_for(x, x.nbytes // group.size(), group)) is None:
            return None
        return peers.exchange(_as_bytes(x), scattered=True).view(x.dtype).view(x.shape)

    def gather_chosen(self, x: Tensor, choices: Choices, group: dist.ProcessGroup) -> Tensor | None:
        """The tokens of all ranks; zeros for those that chose no group of this rank."""
        if (peers := self._peers_for(x, x.nbytes, group, LARGEST)) is None:
            return None
        return peers.exchange_chosen(_as_words(x.contiguous()), choices).view(x.dtype)

    def reduce_scatter_chosen(self, x: Tensor, choices: Choices, group: dist.ProcessGroup) -> Tensor | None:
        """This rank's tokens of the sum of the terms of the ranks whose groups they chose."""
        each = choices.share * x.shape[1] * x.element_size()
        peers = self._peers_for(x, each, group, LARGEST) if x.dtype in FLOATS else None
        return None if peers is None else peers.exchange_chosen(x.contiguous(), choices, summed=True)

    def small(self, x: Tensor, group: dist.ProcessGroup) -> Peers | None:
        """The peers of a group, if a kernel should exchange a tensor with them itself, in one step."""
        few = x.nbytes * (group.size() - 1) <= MOST_SENT and x.dtype in FLOATS
        return self._peers_for(x, x.nbytes, group) if few else None

    def inboxes(self, x: Tensor, size: int, group: dist.ProcessGroup) -> Inboxes | None:
        """Inboxes with `size` bytes for a turn, if matmuls of tensors like this one should store results there."""
        if self._peers_for(x, 1, group) is None:
            return None
        growing = self._inboxes.setdefault(group.group_name, Growing())
        return growing.of(size, partial(shared, group, x.device) if _may_connect() else None)

    def _peers_for(
        self, x: Tensor, each: int, group: dist.ProcessGroup, most: int = MOST_SENT
    ) -> Peers | None:  # fmt: skip
        """The peers of a group, if they should exchange a tensor of which a rank sends `each` bytes to another one.

        More than two ranks leave it to NCCL if a rank sends more than `most` bytes.
        """
        sent = each * (group.size() - 1)
        if not x.is_cuda or type(x) not in (Tensor, Parameter) or torch.compiler.is_compiling():
            return None
        if not 0 < sent <= (LARGEST if group.size() == 2 else most):
            return None
        name = group.group_name
        if name not in self._peers:
            if not _may_connect():
                return None
            self._peers[name] = connected(group, x.device)
        return self._peers[name]


def _as_words(x: Tensor) -> Tensor:
    """Rows as words of four bytes, which take fewer registers; as bytes if they are not aligned."""
    aligned = all(count * x.element_size() % 4 == 0 for count in (x.shape[1], x.storage_offset()))
    return x.view(torch.int32 if aligned else torch.int8)


def _as_bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.int8)


def _may_connect() -> bool:
    """Whether ranks may wait for each other on the host now: not while a graph is captured, or kernels collected."""
    return not torch.cuda.is_current_stream_capturing() and state.planner is None


class Seat(NamedTuple):
    """Where a rank runs.

    Attributes:
        host: What differs between hosts.
        device: The index of its GPU among the GPUs that its process sees.
        reaches: Whether this GPU can address the memory of all others that the process sees.
    """

    host: str
    device: int
    reaches: bool


def can_connect(ranks: Sequence[Seat]) -> bool:
    """Whether the ranks are on one host, each on a GPU with its own index that reaches the others.

    If each process sees one GPU only, all have the index 0, which torch's symmetric memory rejects.
    """
    hosts, devices = {each.host for each in ranks}, {each.device for each in ranks}
    return len(hosts) == 1 and len(devices) == len(ranks) and all(each.reaches for each in ranks)


def connected(group: dist.ProcessGroup, device: torch.device) -> Peers | None:
    """The peers of a group; None if its GPUs are not on one host or cannot address each other. All ranks call this."""
    given: list[Any] = [None] * group.size()
    with torch.cuda.device(device):  # torch exchanges objects through the current one
        dist.all_gather_object(given, Seat(_host(), device.index, _reaches_all(device)), group)
    if not can_connect(given):
        return None
    parts, memories, rank, patience = shared(group, device, memory_bytes(group.size()))
    steps = torch.zeros(PROGRAMS, dtype=torch.int32, device=device)
    return Peers(parts[rank], memories, steps, rank, patience)


def shared(group: dist.ProcessGroup, device: torch.device, size: int) -> Shared:
    """Memory of `size` bytes on each rank, zeros, that all ranks can address. All ranks call this."""
    from torch.distributed import _symmetric_memory as symmetric

    with torch.cuda.device(device):
        own = symmetric.empty(size, dtype=torch.uint8, device=device)
        handle = symmetric.rendezvous(own, group.group_name)
        own.zero_()
        parts = [
            own if rank == group.rank() else handle.get_buffer(rank, (size,), torch.uint8)
            for rank in range(group.size())
        ]
        memories = torch.tensor([part.data_ptr() for part in parts], device=device)
        torch.cuda.synchronize(device)
        dist.barrier(group)  # no rank writes before all memories are zero
    patience = int(1e9 * (knobs.current().collective_seconds or PATIENCE))
    return Shared(tuple(parts), memories, group.rank(), patience)


def _host() -> str:
    """What differs between hosts, also between containers with equal names."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"


def _reaches_all(device: torch.device) -> bool:
    """Whether a GPU can address the memory of all other GPUs that this process sees."""
    others = (other for other in range(torch.cuda.device_count()) if other != device.index)
    return all(torch.cuda.can_device_access_peer(device.index, other) for other in others)
