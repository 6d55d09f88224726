"""How the layers with state go through a packed batch: every sample cut into chunks from its own first token.

A sample of n tokens is n // C whole chunks of C tokens and a tail. Chunks of one width are computed together, whosever they are:
within a chunk the gated delta rule is a few products and a triangular system, and only the state that goes from a chunk to the next
runs in order. Chunks that begin a sample (`fresh`) start without state and skip what reads it. A tail's state is read by nobody, so
it may be padded on the right with copies of its last row, whose results are dropped and whose gradients are zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vlm2vec.attention import Segments

CHUNK = 64  # tokens, C; what flash-linear-attention and transformers take too
NARROW = 64  # heads up to this width take half a chunk: products of C x C numbers would outweigh those with the state
STEP = 16  # a tail is padded to a multiple of so many tokens


@dataclass
class StatefulSegments(Segments):
    """`Segments` with what the layers with state need besides.

    Attributes:
        layout: tensors and numbers of `delta_layout` and `convolution_layout`, in dictionaries and lists.
    """

    layout: dict[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> StatefulSegments:
        return replace(super().to(device), layout=_moved(self.layout, device))


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {name: _moved(entry, device) for name, entry in value.items()}
    return [_moved(entry, device) for entry in value] if isinstance(value, list) else value


def stateful(segments: Segments, *, key_heads: int, value_heads: int, width: int, kernel: int) -> StatefulSegments:
    """The same boundaries, with the layout of layers of so many heads of a width, and of a convolution over `kernel` tokens."""
    chunk = CHUNK if width > NARROW else CHUNK // 2
    layout = {
        "delta": delta_layout(segments.lengths, key_heads=key_heads, value_heads=value_heads, chunk=chunk),
        "convolution": convolution_layout(segments.lengths, kernel),
    }
    return StatefulSegments(**vars(segments), layout=layout)


def delta_layout(lengths: list[int], *, key_heads: int, value_heads: int, chunk: int = CHUNK) -> dict[str, Any]:
    """Which rows make which chunk.

    Args:
        lengths: tokens of each sample, at least 1. chunk: tokens of a whole one.

    Returns:
        steps: whole chunks at each place within their samples; those of place i are of the first `steps[i]` samples by length.
        groups: chunks computed together, {"width", "count", "whole", "fresh", "state"} of each: whole ones that begin a sample, whole
            ones that go on, then tails. A tail's "state" names the samples whose states it reads (None when it is fresh), in the order
            in which samples end their whole chunks.
        key_rows, value_rows: (rows, back) for tensors (T, heads, width) seen as (T * heads, width): the row at each place of the
            groups, chunk by chunk and head by head, and the place of each row.
        boundaries: (B + 1,) int64, for kernels: the same tensor in every layer, since flash-linear-attention remembers what it read of
            a tensor, and reading waits for the device.
    """
    samples = sorted(range(len(lengths)), key=lambda i: -(lengths[i] // chunk))
    starts, total = [], 0
    for length in lengths:
        starts.append(total)
        total += length
    steps: list[int] = []
    while (n := sum(1 for i in samples if lengths[i] // chunk > len(steps))) > 0:
        steps.append(n)
    whole = [(starts[i] + at * chunk, chunk, chunk) for at, n in enumerate(steps) for i in samples[:n]]
    groups = [
        {"width": chunk, "count": sum(part), "whole": True, "fresh": fresh, "state": None}
        for part, fresh in ((steps[:1], True), (steps[1:], False))
    ]
    # Samples leave the scan by number of chunks, few first, and in their own order among equals.
    ended = sorted((i for i in samples if lengths[i] >= chunk), key=lambda i: lengths[i] // chunk)
    place = {i: at for at, i in enumerate(ended)}
    tails: dict[tuple[bool, int], list[int]] = {}
    for i, length in enumerate(lengths):
        if rest := length % chunk:
            tails.setdefault((length < chunk, -(-rest // STEP) * STEP), []).append(i)
    chunks = whole
    for (fresh, width), members in sorted(tails.items()):
        state = None if fresh else torch.tensor([place[i] for i in members])
        groups.append({"width": width, "count": len(members), "whole": False, "fresh": fresh, "state": state})
        chunks = chunks + [(starts[i] + lengths[i] - lengths[i] % chunk, width, lengths[i] % chunk) for i in members]
    layout = {"steps": steps, "groups": [group for group in groups if group["count"]], "key_rows": _rows(chunks, total, key_heads)}
    layout["value_rows"] = layout["key_rows"] if value_heads == key_heads else _rows(chunks, total, value_heads)
    layout["boundaries"] = torch.tensor([*starts, total])
    return layout


def _rows(chunks: list[tuple[int, int, int]], total: int, heads: int) -> list[torch.Tensor]:
    """(rows, back) of chunks given as (first token, width, tokens)."""
    every, back, base = [], torch.empty(total * heads, dtype=torch.long), 0
    head = torch.arange(heads)[:, None]
    by_width: list[list[tuple[int, int, int]]] = []
    for chunk in chunks:
        if not by_width or by_width[-1][0][1] != chunk[1]:
            by_width.append([])
        by_width[-1].append(chunk)
    for run in by_width:  # runs of one width are made at once
        first, _, count = torch.tensor(run).T
        width = run[0][1]
        step = torch.arange(width)
        token = first[:, None] + torch.minimum(step, count[:, None] - 1)
        rows = token[:, None] * heads + head  # (chunks, heads, width)
        real = (step < count[:, None])[:, None].expand_as(rows)
        places = base + torch.arange(rows.numel()).view(rows.shape)
        back[rows[real]] = places[real]
        every.append(rows.flatten())
        base += rows.numel()
    return [torch.cat(every), back]


def convolution_layout(lengths: list[int], kernel: int) -> dict[str, torch.Tensor]:
    """The rows whose window reaches over their sample's first token.

    Returns:
        early: (E,) int64, the first kernel - 1 rows of each sample.
        taps: (E, kernel) int64, the rows that their windows would read, oldest first; `inside`: (E, kernel, 1) bool, whether that
            row is of the same sample.
        sample: (1, T) int32, which sample each row is of.
    """
    early, at = [], []
    start = 0
    for length in lengths:
        n = min(length, kernel - 1)
        early.append(torch.arange(start, start + n))
        at.append(torch.arange(n))
        start += length
    rows, places = torch.cat(early), torch.cat(at)
    behind = torch.arange(kernel - 1, -1, -1)
    inside = behind <= places[:, None]
    taps = torch.where(inside, rows[:, None] - behind, rows[:, None])
    sample = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), torch.tensor(lengths))
    return {"early": rows, "taps": taps, "inside": inside[:, :, None], "sample": sample[None]}
