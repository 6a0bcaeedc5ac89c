"""Pairs of accesses that racecheck reports although something that it does not see orders them.

- Triton tells the warps of `gl.warp_specialize` what to run through bytes in shared memory. The first warps write them
  (STS), all warps meet at named barrier 1, and each other warp reads its own (LDS.U8).
- A warpgroup passes numbers to another one through shared memory and an mbarrier: all its warps meet after the access
  (BAR.SYNC), then one thread arrives at the mbarrier (SYNCS.ARRIVE); the other warpgroup waits for that mbarrier
  (SYNCS.PHASECHK) before its access.
"""

import re
from dataclasses import dataclass

REPORT = re.compile(
    r"Race reported between (\w+) access at (\w+)\+(0x[0-9a-f]+)(.*?)\n.*?and (\w+) access at \w+\+(0x[0-9a-f]+)(.*)"
)
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*)", re.MULTILINE)
_PLACE = re.compile(r"\+?(0x[0-9a-f]+)\]")

Code = list[tuple[int, str, str]]
"""Address, name and operands of each instruction."""


@dataclass(frozen=True)
class Race:
    """A reported pair.

    Attributes:
        kernel: The function.
        places: The addresses of both instructions, by kind: "Read" or "Write".
        text: The report in one line.
    """

    kernel: str
    places: tuple[tuple[str, int], tuple[str, int]]
    text: str


def races_of(said: str) -> list[Race]:
    """The pairs in what racecheck has printed."""
    found = []
    for match in REPORT.finditer(said):
        first, kernel, at, _, second, other, _ = match.groups()
        places = ((first, int(at, 16)), (second, int(other, 16)))
        found.append(Race(kernel, places, " ".join(match.groups())))
    return found


def code_of(sass: str) -> Code:
    """The instructions of a disassembly."""
    return [(int(address, 16), name, rest) for address, name, rest in _INSTRUCTION.findall(sass)]


def is_dispatch(race: Race, code: Code) -> bool:
    """Whether it is Triton's dispatch to specialized warps."""
    places = dict(race.places)
    names = {address: name for address, name, _ in code}
    if places.keys() != {"Read", "Write"}:
        return False
    return names.get(places["Read"]) == "LDS.U8" and names.get(places["Write"]) in ("STS", "STS.64")


def is_handed_over(race: Race, code: Code) -> bool:
    """Whether an mbarrier orders one of the accesses before the other one."""
    (_, first), (_, second) = race.places
    return any(
        given is not None and given == _waited(code, after)
        for before, after in ((first, second), (second, first))
        for given in [_arrived(code, before)]
    )


def _arrived(code: Code, access: int) -> str | None:
    """The mbarrier at which a thread arrives after an access, once all warps of its group have met."""
    met = False
    for address, name, rest in code:
        if address <= access:
            continue
        if name.startswith("BAR.SYNC"):
            met = True
        if name.startswith("SYNCS.ARRIVE"):
            return _place(rest) if met else None
        if name in ("BRA", "EXIT"):
            return None
    return None


def _waited(code: Code, access: int) -> str | None:
    """The mbarrier that was last waited for before an access."""
    waits = [rest for address, name, rest in code if address < access and name.startswith("SYNCS.PHASECHK")]
    return _place(waits[-1]) if waits else None


def _place(rest: str) -> str | None:
    found = _PLACE.search(rest)
    return found and found[1]
