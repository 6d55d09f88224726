"""Tile shapes, few of them, keyed by architecture, element size and how much the epilogue has to hold.

Each was chosen by compiling for the architecture and reading registers, spills and instructions (`python -m bench aot` prints
them, tests/bench/test_aot.py holds them): the accumulator of a tile takes BLOCK_R * BLOCK_C / (32 warps) registers a thread,
128 at most, and the epilogue works in SLICES of columns so that its own values fit beside it. The last row of every table is
the default for an architecture that is not listed; it fits in the 99 KiB of shared memory that any GPU since sm_80 has.
"""

import functools
from dataclasses import dataclass, replace

import torch

from .. import roofline
from .interpreter import INTERPRET

ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Tile:
    """BLOCK_R x BLOCK_C outputs, BLOCK_K of the width at a time."""

    block_r: int
    block_c: int
    block_k: int
    warps: int
    stages: int
    slices: int = 1
    group: int = 8
    resident: bool = False  # top-k: the queries' tile is read once, the whole width of it
    spread: bool = False  # take what registers it needs: ptxas else spills a few to fit one block more on a multiprocessor

    @property
    def constants(self) -> dict:
        return dict(BLOCK_R=self.block_r, BLOCK_C=self.block_c, BLOCK_K=self.block_k)

    @property
    def options(self) -> dict:
        return dict(num_warps=self.warps, num_stages=self.stages) | (dict(maxnreg=255) if self.spread else {})

    def __str__(self):
        return "x".join(str(v) for v in (self.block_r, self.block_c, self.block_k)) + f" w{self.warps} s{self.stages}"


# (architecture, element size, masked epilogue) -> tile; `exp_panel_is_masked` says which epilogues are.
EXP_PANEL = {
    (80, 2, False): Tile(128, 256, 32, 8, 3, 4),
    (80, 2, True): Tile(128, 64, 32, 4, 4, 4, spread=True),
    (90, 2, False): Tile(256, 128, 64, 8, 3, 8),
    (90, 2, True): Tile(128, 128, 64, 8, 4, 8),
    (100, 2, False): Tile(128, 256, 64, 8, 3, 4),
    (100, 2, True): Tile(128, 128, 64, 8, 3, 8),
    (0, 2, False): Tile(128, 128, 32, 8, 3, 4),
    (0, 2, True): Tile(128, 128, 32, 8, 3, 4),
    (0, 4, False): Tile(128, 64, 32, 8, 3, 2),
    (0, 4, True): Tile(128, 64, 32, 8, 3, 2),
}
INTERPRETED = Tile(64, 64, 64, 4, 1, 2)
# A number of columns that every plain tile divides: others need a mask, which the plain tiles have no registers for.
PLAIN_COLUMNS = 256

# Memory-bound passes: a few rows a program so that 2,048 columns of each are 16-byte loads for every thread.
CHUNK_REDUCE = Tile(2, 2048, 1, 8, 1) if not INTERPRET else Tile(32, 128, 1, 4, 1)
CHUNK_WRITE = Tile(8, 512, 1, 4, 1) if not INTERPRET else Tile(32, 128, 1, 4, 1)
# two models' cosines at a time
DISTIL_REDUCE = Tile(2, 1024, 1, 8, 1, spread=True) if not INTERPRET else Tile(32, 128, 1, 4, 1)
DISTIL_WRITE = Tile(4, 512, 1, 4, 1) if not INTERPRET else Tile(32, 128, 1, 4, 1)


def architecture(device: torch.device) -> int:
    """80, 90, 100 for CUDA devices (major * 10 + minor), 0 for the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


@functools.cache
def gpu(device: torch.device) -> roofline.Gpu:
    """What the cost model takes a device for; an H100 stands in for the interpreter's CPU."""
    return roofline.for_arch(architecture(device) or 90, torch.cuda.get_device_name(device) if device.type == "cuda" else "")


def tuned_as(arch: int) -> int:
    """The listed architecture whose tiles a GPU takes, 0 for the default: that of its major number.

    sm_86 and sm_89 take those of sm_80, and so does consumer Blackwell, sm_120, whose tensor cores are programmed as theirs: these
    tiles stay below the 99 KiB that a block has there.
    """
    family = 80 if arch // 10 == 12 else arch // 10 * 10
    return family if family in ARCHITECTURES else 0


def unsupported(arch: int) -> str:
    """Why the kernels cannot take a GPU of this compute capability (times ten), or ""."""
    return "" if arch >= 80 else f"compute capability {arch // 10}.{arch % 10} has no bfloat16 tensor cores, the kernels need 8.0"


def choose(table: dict, arch: int, *key) -> Tile:
    """The entry of the architecture that `arch` is tuned as, else the default."""
    return table.get((tuned_as(arch), *key)) or table[(0, *key)]


# The accumulator outlives every prefix's epilogue: fewer registers are left for that, but on sm_100, where it is read anew from
# tensor memory, but where columns are odd. (architecture, odd) -> tile.
PREFIXES = {
    (80, False): Tile(128, 64, 32, 8, 4, 4),
    (80, True): Tile(128, 64, 32, 8, 4, 4),
    (90, False): Tile(128, 64, 64, 8, 4, 4),
    (90, True): Tile(128, 64, 64, 8, 4, 4),
    (100, False): Tile(128, 128, 64, 8, 3, 8),
    (100, True): Tile(128, 64, 64, 8, 3, 4),
}


def exp_panel_tile(
    arch: int, itemsize: int, columns: int, *, masks=False, scale=False, row_max=False, col_sum=False, levels=False
) -> tuple[int, int]:
    """(rows, columns) of the tile that a launch takes on a GPU: what the cost model prices. Arguments as for `exp_panel_is_masked`."""
    odd = columns % PLAIN_COLUMNS != 0
    if levels and itemsize <= 2 and (tuned_as(arch), odd) in PREFIXES:
        tile = PREFIXES[tuned_as(arch), odd]
    else:
        masked = levels or exp_panel_is_masked(arch, masks, scale, row_max, col_sum, False, odd)
        tile = choose(EXP_PANEL, arch, 4 if itemsize >= 4 else 2, masked)
    return tile.block_r, tile.block_c


def exp_panel(arch: int, itemsize: int, masked: bool, prefixes: bool = False, odd: bool = False) -> Tile:
    """masked: as `exp_panel_is_masked` says; with prefixes, whether columns are odd. odd: columns that 256 does not divide."""
    if INTERPRET:
        return INTERPRETED
    if prefixes and itemsize <= 2 and (tuned_as(arch), masked) in PREFIXES:
        return PREFIXES[tuned_as(arch), masked]
    tile = choose(EXP_PANEL, arch, 4 if itemsize >= 4 else 2, masked or prefixes)
    # on sm_100 even columns spill if they are let, odd ones if they are not
    return replace(tile, spread=True) if odd and masked and tuned_as(arch) == 100 else tile


# The panel of warp_specialised.py: (architecture, norms) -> tile. num_warps is that of a group, of which the compiler makes two on sm_90,
# and none if given 8. On sm_100 the wide tile spills with norms.
WARP_SPECIALISED = {
    (90, False): Tile(128, 256, 64, 4, 3),
    (90, True): Tile(128, 256, 64, 4, 3),
    (100, False): Tile(128, 256, 64, 8, 3),
    (100, True): Tile(128, 128, 64, 8, 4),
}
# Architectures on which it was measured to beat EXP_PANEL's: there panel="auto" takes it. None has been measured.
WARP_SPECIALISED_FASTER = frozenset()


def warp_specialised(arch: int, scale: bool) -> Tile:
    return INTERPRETED if INTERPRET else WARP_SPECIALISED[tuned_as(arch), scale]


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU, 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def exp_panel_is_masked(arch: int, masks, scale, row_max, col_sum, redo, odd) -> bool:
    """Whether an epilogue spills in the wide tile, or nearly: registers as compiled by triton 3.6, 3.8 and 3.9.

    Args: what it holds. masks: ids, thresholds or column masks. scale: norms. row_max, col_sum: beside the rows' sums. redo: the
    second launch over unsafe rows. odd: columns that 256 does not divide.
    """
    if tuned_as(arch) == 100:
        return bool(masks or col_sum or redo or odd or scale and row_max)  # norms alone: 255; all others spill with some triton
    # sm_90: without a maximum everything at once takes 234 registers, odd columns 255 alone; with one, norms 255 and masks spill
    # sm_80: as much, but 2 spills where masks meet column sums
    return bool(
        redo or row_max and (masks or col_sum or odd) or odd and (masks or scale or col_sum) or tuned_as(arch) == 80 and masks and col_sum
    )


# (architecture, element size) -> tile: a dozen values of a pair are alive at once, so slices are narrow.
SIGMOID = {
    (80, 2): Tile(128, 128, 32, 8, 4, 4),
    (90, 2): Tile(128, 128, 64, 8, 4, 8),
    (100, 2): Tile(128, 128, 64, 8, 3, 4),
    (0, 2): Tile(128, 128, 32, 8, 3, 8),
    (0, 4): Tile(128, 64, 32, 8, 3, 4),
}


def sigmoid_panel(arch: int, itemsize: int) -> Tile:
    return INTERPRETED if INTERPRET else choose(SIGMOID, arch, 4 if itemsize >= 4 else 2)


# (architecture, element size, more than 32 kept) -> tile: scores and the kept lists share the registers.
TOPK = {
    (80, 2, False): Tile(64, 128, 32, 4, 4, spread=True),
    (80, 2, True): Tile(64, 64, 32, 8, 4, spread=True),
    (80, 4, False): Tile(32, 128, 32, 8, 3, spread=True),
    (90, 2, False): Tile(64, 128, 64, 4, 4, spread=True),
    (90, 2, True): Tile(64, 64, 64, 8, 4, spread=True),
    (100, 2, False): Tile(128, 64, 64, 8, 3, spread=True),
    (100, 2, True): Tile(128, 32, 64, 8, 3, spread=True),
    (0, 2, False): Tile(64, 128, 32, 4, 3, spread=True),
    (0, 2, True): Tile(64, 64, 32, 8, 3, spread=True),
    (0, 4, False): Tile(64, 64, 16, 4, 2, spread=True),
    (0, 4, True): Tile(32, 64, 16, 4, 2, spread=True),
}


# (architecture, more than 32 kept) -> tile for queries that stay on the chip. Two blocks of the first of each share a
# multiprocessor, so that one multiplies while the other selects: no compiler here lets the products of a block run on beside its own
# selection. 128 queries would halve what comes from L2, but leave room for one block: 2.0 of the bare product on an H100, PREDICTED,
# where 64 take 1.6.
TOPK_RESIDENT = {
    (80, False): Tile(64, 64, 128, 4, 2, resident=True, spread=True),
    (80, True): Tile(64, 64, 64, 8, 2, resident=True, spread=True),
    (90, False): Tile(64, 64, 128, 4, 2, resident=True, spread=True),
    (90, True): Tile(64, 128, 128, 8, 2, resident=True, spread=True),
    (100, False): Tile(64, 64, 128, 4, 2, resident=True, spread=True),
    (100, True): Tile(64, 64, 128, 8, 2, resident=True, spread=True),
}
RESIDENT_WIDTH = 256


def topk(arch: int, itemsize: int, kept: int, width: int) -> Tile:
    if INTERPRET:
        return INTERPRETED
    resident_tile = TOPK_RESIDENT.get((tuned_as(arch), kept > 32)) if itemsize == 2 and width <= RESIDENT_WIDTH else None
    return resident_tile or choose(TOPK, arch, 4 if itemsize >= 4 else 2, kept > 32)


EMPTY_LIST = 64  # tiles that a share's first ones cost more, while its lists fill


def topk_splits(slots: int, tiles_r: int, tiles_c: int) -> int:
    """Pieces of the targets, so that programs fill whole waves of the `slots` blocks that run at a time."""
    most = min(tiles_c, max(16, 2 * slots // tiles_r))
    return min(range(1, most + 1), key=lambda splits: -(-tiles_r * splits // slots) * (-(-tiles_c // splits) + EMPTY_LIST))


FUSED_COLUMNS = 128  # every plain tile of a fused pass divides it
# (architecture, width of a row on the chip, pass, masked) -> tile; block_k is not used, the whole width is there. The forward owns
# BLOCK_R rows and walks columns, the backward owns BLOCK_C columns and walks rows. Rich ones are as narrow as triton 3.6 needs: in
# 128 x 64 it spills where 3.8 takes 215 to 255 registers.
FUSED = {
    (80, 64, "forward", False): Tile(128, 64, 0, 8, 3),
    (80, 64, "forward", True): Tile(64, 32, 0, 4, 3),
    (80, 64, "backward", False): Tile(64, 128, 0, 8, 3),
    (80, 64, "backward", True): Tile(64, 128, 0, 8, 3),
    (80, 128, "forward", False): Tile(128, 64, 0, 8, 3),
    (80, 128, "forward", True): Tile(128, 32, 0, 8, 3),
    (80, 128, "backward", False): Tile(64, 128, 0, 8, 3),
    (80, 128, "backward", True): Tile(64, 64, 0, 8, 3),
    (90, 64, "forward", False): Tile(128, 128, 0, 8, 3),
    (90, 64, "forward", True): Tile(128, 64, 0, 8, 3),
    (90, 64, "backward", False): Tile(128, 128, 0, 8, 3),
    (90, 64, "backward", True): Tile(64, 128, 0, 8, 3),
    (90, 128, "forward", False): Tile(128, 128, 0, 8, 2),
    (90, 128, "forward", True): Tile(128, 64, 0, 8, 2),
    (90, 128, "backward", False): Tile(128, 128, 0, 8, 2),
    (90, 128, "backward", True): Tile(64, 128, 0, 8, 2),
    (100, 64, "forward", False): Tile(128, 128, 0, 8, 2),
    (100, 64, "forward", True): Tile(128, 64, 0, 8, 2),
    (100, 64, "backward", False): Tile(64, 128, 0, 8, 2),
    (100, 64, "backward", True): Tile(64, 128, 0, 8, 2),
    (100, 128, "forward", False): Tile(128, 64, 0, 8, 2),
    (100, 128, "forward", True): Tile(128, 32, 0, 8, 2),
    (100, 128, "backward", False): Tile(64, 128, 0, 8, 2),
    (100, 128, "backward", True): Tile(64, 64, 0, 8, 2),
} | {(0, width, which, masks): Tile(64, 64, 0, 8, 2) for width in (64, 128) for which in ("forward", "backward") for masks in (False, True)}


def is_masked(columns, ids, threshold, keep, row_scale) -> bool:
    """Whether an epilogue holds more than the positive's comparison: masks, norms, or the end of a ragged number of columns."""
    return bool(ids) or threshold is not None or keep is not None or row_scale is not None or columns % FUSED_COLUMNS != 0


def fused(arch: int, width: int, which: str, masked: bool) -> Tile:
    """Tile of a fused pass; `width` is the power of two that the rows are padded to."""
    return INTERPRETED if INTERPRET else choose(FUSED, arch, max(64, width), which, masked)


def fused_splits(device: torch.device, programs: int) -> int:
    """Pieces of the inner loop, so that about two programs wait for each multiprocessor."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(1, 2 * processors // max(programs, 1))
