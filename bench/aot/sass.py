"""Reads machine code of NVIDIA GPUs as nvdisasm prints it: loops, the hot loop, instructions by kind.

The hot loop is the innermost loop that holds tensor-core instructions, or else memory loads; what runs after it, to the end of the
loop over tiles where there is one, is the epilogue.
Static counts: an instruction counts once wherever it stands, a branch not taken counts too.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)$")
_TARGET = re.compile(r"\((\.L_x_\d+)\)")
TENSOR = ("HMMA", "HGMMA", "UTCHMMA", "QGMMA", "IMMA", "DMMA")
WIDE_LOADS = re.compile(r"^(LDGSTS|LDG)\b.*\.128|^UTMALDG|^UBLKCP|^LDGSTS.*\.BYPASS\.LTC128B\.128")


@dataclass
class Instruction:
    position: int
    name: str  # first part, LDGSTS
    full: str  # all parts, LDGSTS.E.BYPASS.128
    operands: str


@dataclass
class Code:
    instructions: list[Instruction]
    labels: dict[str, int] = field(default_factory=dict)

    def loops(self) -> list[tuple[int, int]]:
        """(first, last) positions of every backward branch's body."""
        out = []
        for instruction in self.instructions:
            if instruction.name in ("BRA", "BRX", "JMP"):
                target = _TARGET.search(instruction.operands)
                if target and self.labels.get(target[1], 1 << 60) < instruction.position:
                    out.append((self.labels[target[1]], instruction.position))
        return out

    def count(self, first: int = 0, last: int = 1 << 60) -> Counter:
        return Counter(i.name for i in self.instructions if first <= i.position <= last)

    def hot_loop(self) -> tuple[int, int] | None:
        """Innermost loop with the most tensor-core instructions; without any, with the most memory loads or FMAs."""
        loops = [loop for loop in self.loops() if self._heavy(loop)]
        # a loop over loads, inside one that multiplies, does not take its place
        multiply = [loop for loop in loops if self._tensor(loop)] or loops
        inner = [a for a in multiply if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in multiply)]
        return max(inner, key=self._heavy, default=None)

    def around(self, loop: tuple[int, int]) -> tuple[int, int] | None:
        """The innermost loop that holds another: that over tiles, of a kernel whose programs walk several."""
        return min((a for a in self.loops() if a != loop and a[0] <= loop[0] and loop[1] <= a[1]), key=lambda a: a[1] - a[0], default=None)

    def first_with(self, name: str) -> tuple[int, int] | None:
        """The first innermost loop that holds at least a third of a kernel's instructions of a kind."""
        whole = self.count()[name]
        busy = [loop for loop in self.loops() if 3 * self.count(*loop)[name] >= whole > 0]
        return min((a for a in busy if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in busy)), default=None)

    def _tensor(self, loop: tuple[int, int]) -> int:
        counts = self.count(*loop)
        return sum(counts[name] for name in TENSOR)

    def _heavy(self, loop: tuple[int, int]) -> int:
        counts = self.count(*loop)
        return self._tensor(loop) * 1000 or counts["FFMA"] + counts["LDG"] + counts["LDGSTS"]

    def wide_copies(self, first: int, last: int) -> int:
        """Copies from global to shared memory that move 16 bytes a thread."""
        copies = (i for i in self.instructions if first <= i.position <= last and i.name == "LDGSTS")
        return sum(".128" in i.full.replace("LTC128B", "") for i in copies)

    def narrow_loads(self, first: int, last: int) -> list[str]:
        """Copies from global to shared memory, or big loads, that move less than 16 bytes a thread."""
        copies = [i for i in self.instructions if first <= i.position <= last and i.name in ("LDGSTS", "UTMALDG")]
        return [i.full for i in copies if i.name == "LDGSTS" and ".128" not in i.full.replace("LTC128B", "")]


def parse(text: str) -> Code:
    instructions, labels = [], {}
    position = 0
    pending: list[str] = []
    for line in text.splitlines():
        label = _LABEL.match(line)
        if label:
            pending.append(label[1])
            continue
        found = _INSTRUCTION.match(line)
        if not found:
            continue
        for name in pending:
            labels[name] = position
        pending = []
        full = found[2]
        instructions.append(Instruction(position, full.split(".")[0], full, found[3]))
        position += 1
    return Code(instructions, labels)
