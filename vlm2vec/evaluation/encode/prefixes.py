"""Samples that begin alike are computed once as far as they are alike: one picture under several instructions, one instruction before
many texts.

A token sees the past alone, so what a decoder makes of a prefix does not depend on what follows. A chunk is laid out as

    the beginnings (shared prefixes, and samples that share none) | what follows the prefixes

The beginnings are ordinary packed samples. A follower's queries are its own tokens, its keys the prefix's and its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from vlm2vec.attention import Segments, sdpa_packed
from vlm2vec.packing import Features, PackedBatch

SHORTEST = 8  # tokens of a prefix that is worth sharing
MOST_PADDED = 0.2  # of a bucket's scores


@dataclass
class Family:
    """`rows` of a shard whose first `shared` tokens are the same; 0 for one that shares none.

    Attributes:
        lengths: tokens of each row, the shared ones included.
    """

    shared: int
    rows: list[int]
    lengths: list[int]

    @property
    def tokens(self) -> int:
        """Tokens that the decoder sees."""
        return self.shared + sum(length - self.shared for length in self.lengths)


def families(features: list[Features], groups: list[bytes]) -> list[Family]:
    """Rows by their longest useful prefix. Media are shared whole or not at all.

    Args:
        groups: the content of each row's media, b"" for none: token ids alone do not tell pictures of one size apart.
    """
    ids = [f.input_ids.numpy() for f in features]
    order = sorted(range(len(features)), key=lambda i: (groups[i], ids[i].astype(">i8").tobytes(), i))
    found: list[Family] = []
    for i in order:
        if found and groups[found[-1].rows[0]] == groups[i]:
            last = found[-1]
            shared = _alike(features[last.rows[0]], features[i], ids[last.rows[0]], ids[i])
            shared = shared if len(last.rows) == 1 else min(shared, last.shared)
            if shared >= SHORTEST and shared * len(last.rows) >= last.shared * (len(last.rows) - 1):
                last.shared, last.rows, last.lengths = shared, [*last.rows, i], [*last.lengths, len(ids[i])]
                continue
        found.append(Family(0, [i], [len(ids[i])]))
    return found


def _alike(a: Features, b: Features, ids_a: np.ndarray, ids_b: np.ndarray) -> int:
    """How many first tokens of two samples are the same, with their positions and media; one at least is left to follow."""
    most = min(len(ids_a), len(ids_b)) - 1
    differ = ids_a[:most] != ids_b[:most]
    shared = int(differ.argmax()) if differ.any() else most
    if shared == 0 or (a.position_ids is None) != (b.position_ids is None):
        return 0
    if a.position_ids is not None:
        apart = (a.position_ids[..., :shared] != b.position_ids[..., :shared]).reshape(-1, shared).any(0)
        shared = int(apart.int().argmax()) if bool(apart.any()) else shared
    for each in (a, b):
        if each.visual_index is not None and len(each.visual_index) and int(each.visual_index[-1]) >= shared:
            return 0
    return shared


def family_chunks(found: list[Family], budget: int, most_rows: int) -> list[list[Family]]:
    """Chunks of at most `budget` tokens and `most_rows` rows, families of similar length together; a large family is cut."""
    pieces = []
    for family in found:
        at = 0
        while at < len(family.rows):
            end, tokens = at, family.shared
            while end < len(family.rows) and end - at < most_rows:
                tokens += family.lengths[end] - family.shared
                if end > at and tokens > budget:
                    break
                end += 1
            rows, lengths = family.rows[at:end], family.lengths[at:end]
            pieces.append(Family(family.shared if len(rows) > 1 else 0, rows, lengths))
            at = end
    chunks: list[list[Family]] = []
    tokens = rows = 0
    for piece in sorted(pieces, key=lambda p: (-max(p.lengths), p.rows)):
        if not chunks or tokens + piece.tokens > budget or rows + len(piece.rows) > most_rows:
            chunks.append([])
            tokens = rows = 0
        chunks[-1].append(piece)
        tokens, rows = tokens + piece.tokens, rows + len(piece.rows)
    return chunks


@dataclass
class Bucket:
    """Followers of similar length, attended in one call: places (n, Sq) and (n, Sk) in the packed sequence, padding repeats a place;
    `own` says where in (n * Sq) the real ones stand, `mask` (n, 1, Sq, Sk) which keys a query sees."""

    queries: torch.Tensor
    keys: torch.Tensor
    own: torch.Tensor
    mask: torch.Tensor

    def to(self, device: torch.device | str) -> Bucket:
        return Bucket(*(x.to(device, non_blocking=True) for x in (self.queries, self.keys, self.own, self.mask)))


@dataclass
class SharedSegments(Segments):
    """`Segments` of a chunk whose followers see a prefix besides themselves. `provider` is `shared_attention`.

    Attributes:
        beginnings: the segments of the first part. buckets: the followers, whose tokens stand one bucket behind the other.
    """

    beginnings: Segments | None = None
    buckets: list[Bucket] | None = None

    def to(self, device: torch.device | str) -> SharedSegments:
        return replace(super().to(device), beginnings=self.beginnings.to(device), buckets=[b.to(device) for b in self.buckets])


@dataclass
class SharedBatch(PackedBatch):
    """A packed chunk whose samples end at `ends` (B,), wherever their beginnings stand."""

    ends: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def last_index(self) -> torch.Tensor:
        return self.ends

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> SharedBatch:
        return replace(super().to(device, dtype), ends=self.ends.to(device))


def pack_families(chunk: list[Family], features: list[Features], pack: Callable[[list[Features]], PackedBatch]) -> tuple[PackedBatch, list]:
    """(packed chunk, the row of each of its embeddings). The features hold no media; their vision features are handed to the model.

    Args:
        pack: `VLM2Vec.pack`.
    """
    beginnings, followers, rows, ends, at = [], [], [], [], 0
    for family in chunk:
        first = features[family.rows[0]]
        if not family.shared:
            beginnings.append(first)
            at += first.length
            rows, ends = [*rows, family.rows[0]], [*ends, at - 1]
            continue
        beginnings.append(_cut(first, 0, family.shared))
        followers += [(row, at, family.shared, length) for row, length in zip(family.rows, family.lengths)]
        at += family.shared
    if not followers:
        return pack(beginnings), rows
    # Of similar length together: they share a call.
    followers.sort(key=lambda f: (-(f[3] - f[2]), -f[3], f[0]))
    tails = [_cut(features[row], shared, length) for row, _, shared, length in followers]
    packed = pack(beginnings + tails)
    segments = Segments.from_lengths([b.length for b in beginnings], causal=True)
    buckets, place = [], at
    for bucket in _buckets(followers):
        buckets.append(_bucket(bucket, place))
        place += sum(length - shared for _, _, shared, length in bucket)
    for row, _, shared, length in followers:
        at += length - shared
        rows, ends = [*rows, row], [*ends, at - 1]
    lengths, bounds = packed.segments.lengths, packed.segments.cu_seqlens
    shared_segments = SharedSegments(lengths, bounds, True, [], None, None, shared_attention, segments, buckets)
    fields = {name: getattr(packed, name) for name in ("input_ids", "position_ids", "vision", "visual_index")}
    return SharedBatch(**fields, segments=shared_segments, ends=torch.tensor(ends)), rows


def _cut(features: Features, first: int, last: int) -> Features:
    """A sample's tokens from `first` to before `last`, with their positions; visual tokens are all in its beginning."""
    positions = torch.arange(features.length) if features.position_ids is None else features.position_ids
    index = features.visual_index if first == 0 else None
    return Features(features.input_ids[first:last], {}, index, positions[..., first:last])


def _buckets(followers: list[tuple]) -> list[list[tuple]]:
    """Followers in calls: one pads at most `MOST_PADDED` of its scores."""
    found: list[list[tuple]] = []
    scores = queries = keys = 0
    for follower in followers:
        _, _, shared, length = follower
        own = (length - shared) * length
        most_q, most_k = max(queries, length - shared), max(keys, length)
        if found and (len(found[-1]) + 1) * most_q * most_k <= (scores + own) / (1 - MOST_PADDED):
            found[-1].append(follower)
            scores, queries, keys = scores + own, most_q, most_k
        else:
            found.append([follower])
            scores, queries, keys = own, length - shared, length
    return found


def _bucket(followers: list[tuple], start: int) -> Bucket:
    """The places of a bucket's rows; its followers stand one behind the other from `start`."""
    begin = torch.tensor([at for _, at, _, _ in followers])[:, None]
    shared = torch.tensor([shared for _, _, shared, _ in followers])[:, None]
    own = torch.tensor([length - shared for _, _, shared, length in followers])[:, None]
    where = start + own.cumsum(0) - own
    step_q, step_k = torch.arange(int(own.max())), torch.arange(int((own + shared).max()))
    queries = where + torch.minimum(step_q, own - 1)
    behind = torch.minimum(step_k - shared, own - 1)
    keys = torch.where(step_k < shared, begin + step_k, where + behind.clamp(min=0))
    seen = torch.minimum(step_q, own - 1) + shared  # the last key that a query sees
    real = (step_q < own).flatten().nonzero()[:, 0]
    return Bucket(queries.flatten(), keys.flatten(), real, step_k <= seen[..., None].unsqueeze(1))


def shared_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: SharedSegments,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    window: int | None = None,
) -> torch.Tensor:
    """`vlm2vec.attention.sdpa_packed` for `SharedSegments`: q (T, Hq, D), k and v (T, Hk, D) -> (T, Hq, D)."""
    if window is not None or dropout:
        raise ValueError(f"expected no window and no dropout where prefixes are shared, got {window} and {dropout}; pack samples whole")
    first = segments.beginnings.total
    parts = [sdpa_packed(q[:first], k[:first], v[:first], segments.beginnings, scale=scale)]
    for bucket in segments.buckets:
        count = len(bucket.mask)
        qb, kb, vb = (
            x.index_select(0, rows).view(count, -1, *x.shape[1:]).transpose(1, 2)
            for x, rows in ((q, bucket.queries), (k, bucket.keys), (v, bucket.keys))
        )
        out = F.scaled_dot_product_attention(qb, kb, vb, attn_mask=bucket.mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        parts.append(out.transpose(1, 2).reshape(-1, q.shape[1], q.shape[2]).index_select(0, bucket.own))
    return torch.cat(parts)
