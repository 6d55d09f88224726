"""Attention over packed samples: one interface, four providers.

A packed tensor holds the tokens of many samples one behind the other; no token may see another sample's. Providers:

    flash_attn_4 flash_attn.cute.flash_attn_varlen_func          Hopper and newer, fp16 / bf16; wheels of the package flash-attn-4
    flash_attn   flash_attn.flash_attn_varlen_func               CUDA, fp16 / bf16
    varlen       torch.nn.attention.varlen.varlen_attn           CUDA, fp16 / bf16
    sdpa         scaled_dot_product_attention by groups of segments, every device and dtype

The SDPA provider does not loop over segments. Segments of similar length are gathered into one batch: a causal segment may be
padded on the right without a mask, since no real query sees a later key, and a bidirectional one takes a key mask. Gather and
scatter are plain row copies in both directions (`_Rows`), because the padding's gradient is exactly zero.

Layers reach the provider through transformers' attention registry: `register()` adds the names below, and every forward call
hands over its `Segments` as the keyword argument `segments`. A name with "flash" in it makes transformers' vision towers pass
the packed sequence whole instead of cutting it themselves. Calls without `segments` are ordinary SDPA calls.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F

PROVIDERS = ("sdpa", "flash_attn_4", "flash_attn", "varlen")
TEXT_ATTENTION = "vlm2vec_packed"
VISION_ATTENTION = "vlm2vec_packed_flash"
# Padding a group costs arithmetic, another group costs a call: below this share of padded scores one group is cheaper. A key
# mask makes SDPA itself slower, so that bidirectional segments are only padded where a call would be all overhead.
MAX_WASTE = 0.15
FREE_SLACK = 8  # tokens of difference that are always padded over ...
SMALL = 64  # ... in segments up to this length


@dataclass
class Group:
    """`count` segments attended in one SDPA call, each padded to `length` rows."""

    count: int
    length: int
    key_mask: torch.Tensor | None  # (n, 1, 1, length) bool; None when causal or nothing is padded


@dataclass
class Segments:
    """Boundaries of B packed samples, prepared once for all layers.

    Attributes:
        lengths: tokens per sample, Python integers, so that no provider synchronises with the device.
        cu_seqlens: (B+1,) int32.
        causal: whether a token sees only its own past.
        groups: what the SDPA provider batches together.
        rows, inverse: packed token of each grouped row, and grouped row of each packed token; None when the packed order serves as it
            is: segments of one length, or groups that follow one another and are not padded.
        provider: one of `PROVIDERS`, or a function with `sdpa_packed`'s arguments that does it in their place.
    """

    lengths: list[int]
    cu_seqlens: torch.Tensor
    causal: bool
    groups: list[Group]
    rows: torch.Tensor | None
    inverse: torch.Tensor | None
    provider: str | Callable = "sdpa"

    @property
    def max_length(self) -> int:
        return max(self.lengths, default=0)

    @property
    def total(self) -> int:
        return sum(self.lengths)

    @classmethod
    def from_lengths(cls, lengths: list[int], *, causal: bool, provider: str | Callable = "sdpa") -> "Segments":
        cu = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        if lengths:
            cu[1:] = torch.tensor(lengths).cumsum(0)
        return cls(list(lengths), cu, causal, *_group(lengths, cu, causal), provider)

    def to(self, device: torch.device | str) -> "Segments":
        def move(x):
            return None if x is None else x.to(device, non_blocking=True)

        groups = [replace(g, key_mask=move(g.key_mask)) for g in self.groups]
        tensors = {k: move(getattr(self, k)) for k in ("cu_seqlens", "rows", "inverse")}
        return replace(self, groups=groups, **tensors)


def _group(lengths: list[int], cu: torch.Tensor, causal: bool) -> tuple[list[Group], torch.Tensor | None, torch.Tensor | None]:
    """Gather segments of similar length; returns groups, rows and inverse as `Segments` describes them."""
    if len(set(lengths)) <= 1:
        return [Group(len(lengths), lengths[0] if lengths else 0, None)], None, None
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    buckets, current, scores = [], [], 0
    for i in order:
        top, length = lengths[current[0]] if current else lengths[i], lengths[i]
        padded = top * top * (len(current) + 1)
        near = top == length or (top <= SMALL and top - length <= FREE_SLACK)
        if current and not near and not (causal and padded - scores - length * length <= MAX_WASTE * padded):
            buckets.append(current)
            current, scores = [], 0
        current.append(i)
        scores += length * length
    buckets.append(current)
    all_lengths = torch.tensor(lengths)
    inverse = torch.empty(sum(lengths), dtype=torch.long)
    groups, all_rows, base = [], [], 0
    for bucket in buckets:
        member = all_lengths[bucket]
        top, start = int(member[0]), cu[:-1].long()[bucket]
        step = torch.arange(top)
        real = step < member[:, None]
        rows = start[:, None] + torch.minimum(step, member[:, None] - 1)  # padding repeats the segment's last token
        inverse[rows[real]] = base + torch.arange(len(bucket) * top).view(len(bucket), top)[real]
        mask = None if causal or bool(real.all()) else real[:, None, None, :]
        groups.append(Group(len(bucket), top, mask))
        all_rows.append(rows.flatten())
        base += len(bucket) * top
    order = torch.cat(all_rows)
    if base == len(inverse) and torch.equal(order, torch.arange(base)):
        return groups, None, None
    return groups, order, inverse


class _Rows(torch.autograd.Function):
    """x[index] whose backward copies rows back instead of adding them: right where duplicates carry zero gradient."""

    @staticmethod
    def forward(ctx, x, index, back) -> torch.Tensor:
        ctx.save_for_backward(index if back is None else back)
        ctx.shape, ctx.scatter = x.shape, back is None
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad) -> torch.Tensor:
        (rows,) = ctx.saved_tensors
        if not ctx.scatter:
            return grad.index_select(0, rows), None, None
        return grad.new_zeros(ctx.shape).index_copy_(0, rows, grad), None, None


def _sdpa_group(q, k, v, group: Group, causal: bool, scale, dropout: float, window: int | None):
    """(n * L, H, D) rows -> (n * L, H, D)."""
    q, k, v = (x.view(group.count, group.length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    mask = group.key_mask
    if window is not None and group.length > window:
        step = torch.arange(group.length, device=q.device)
        near = (step[:, None] - step[None, :]) < window
        near = near & (step[:, None] >= step[None, :]) if causal else near & ((step[None, :] - step[:, None]) < window)
        mask, causal = near if mask is None else mask & near, False
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2).reshape(group.count * group.length, out.shape[1], out.shape[3])


def sdpa_packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: Segments,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    window: int | None = None,
) -> torch.Tensor:
    """Packed attention through SDPA. q (T, Hq, D), k and v (T, Hk, D), Hk divides Hq -> (T, Hq, D)."""
    if segments.inverse is None and len(segments.groups) == 1:
        return _sdpa_group(q, k, v, segments.groups[0], segments.causal, scale, dropout, window)
    sizes = [g.count * g.length for g in segments.groups]
    if segments.inverse is None:
        parts = zip(*(x.split(sizes) for x in (q, k, v)))
        return torch.cat([_sdpa_group(*part, g, segments.causal, scale, dropout, window) for part, g in zip(parts, segments.groups)])
    parts = zip(*(_Rows.apply(x, segments.rows, segments.inverse).split(sizes) for x in (q, k, v)))
    outs = [_sdpa_group(*part, g, segments.causal, scale, dropout, window) for part, g in zip(parts, segments.groups)]
    return _Rows.apply(outs[0] if len(outs) == 1 else torch.cat(outs), segments.inverse, None)


def flash_attn_packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: Segments,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    window: int | None = None,
) -> torch.Tensor:
    """Packed attention through the flash-attn package; shapes as `sdpa_packed`."""
    from flash_attn import flash_attn_varlen_func

    left = -1 if window is None else window - 1
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=segments.cu_seqlens,
        cu_seqlens_k=segments.cu_seqlens,
        max_seqlen_q=segments.max_length,
        max_seqlen_k=segments.max_length,
        dropout_p=dropout,
        softmax_scale=scale,
        causal=segments.causal,
        window_size=(left, 0 if segments.causal else left),
    )


def flash_attn_4_packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: Segments,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    window: int | None = None,
) -> torch.Tensor:
    """Packed attention through the flash-attn-4 package; shapes as `sdpa_packed`. Head widths it does not take go through torch."""
    if dropout:
        raise ValueError(f"attn='flash_attn_4' has no attention dropout (got {dropout}); use attn='flash_attn' or 'sdpa'")
    if not flash_attn_4_takes(q.shape[2], _capability(q.device)):
        return (varlen_packed if _has_varlen() else sdpa_packed)(q, k, v, segments, scale=scale, window=window)
    from flash_attn.cute import flash_attn_varlen_func

    near = None if window is None else window - 1
    out = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=segments.cu_seqlens,
        cu_seqlens_k=segments.cu_seqlens,
        max_seqlen_q=segments.max_length,
        max_seqlen_k=segments.max_length,
        softmax_scale=scale,
        causal=segments.causal,
        window_size=(near, 0 if segments.causal and near is not None else near),
    )
    return out[0] if isinstance(out, tuple) else out  # with the log-sum-exp, or None in its place


def flash_attn_4_takes(width: int, capability: int) -> bool:
    """Whether flash-attn 4 has forward and backward for heads of this width on a card of this compute capability (its major number)."""
    if width % 8 or width < 8:
        return False
    return {9: width <= 256, 10: width <= 128 or width == 256, 11: width <= 128 or width == 256, 12: width <= 128}.get(capability, False)


def varlen_packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: Segments,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    window: int | None = None,
) -> torch.Tensor:
    """Packed attention through torch's own varlen kernels; they have no dropout and say causal by the window (-1, 0)."""
    from torch.nn.attention.varlen import varlen_attn

    if dropout:
        raise ValueError(f"attn='varlen' has no attention dropout (got {dropout}); use attn='flash_attn' or 'sdpa'")
    left = -1 if window is None else window - 1
    # torch 2.11 has no such argument: its kernels share key heads among query heads without being told
    grouped = {"enable_gqa": q.shape[1] != k.shape[1]} if "enable_gqa" in _parameters(varlen_attn) else {}
    return varlen_attn(
        q,
        k,
        v,
        segments.cu_seqlens,
        segments.cu_seqlens,
        segments.max_length,
        segments.max_length,
        scale=scale,
        window_size=(left, 0 if segments.causal else left),
        **grouped,
    )


@cache
def _parameters(function) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


_PROVIDER_FUNCTIONS = {"sdpa": sdpa_packed, "flash_attn_4": flash_attn_4_packed, "flash_attn": flash_attn_packed, "varlen": varlen_packed}


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: Segments,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    window: int | None = None,
) -> torch.Tensor:
    """Attention within each segment, by the provider that `segments` names. q (T, Hq, D), k, v (T, Hk, D) -> (T, Hq, D)."""
    provider = segments.provider if callable(segments.provider) else _PROVIDER_FUNCTIONS[segments.provider]
    return provider(q, k, v, segments, scale=scale, dropout=dropout, window=window)


def choose_provider(attn: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """Settle `attn` ("auto", None or a provider's name) for a device and dtype.

    Raises:
        ValueError: an unknown name, or a provider that cannot run here; says what to use instead.
    """
    if attn not in (None, "auto", *PROVIDERS):
        raise ValueError(f"attn={attn!r}: expected 'auto', {', '.join(map(repr, PROVIDERS))}")
    low = dtype in (torch.float16, torch.bfloat16)
    if attn in (None, "auto"):
        if device.type != "cuda" or not low:
            return "sdpa"
        if _has_flash_attn_4() and flash_attn_4_takes(128, _capability(device)):
            return "flash_attn_4"
        return "flash_attn" if _has_flash_attn() else "varlen" if _has_varlen() else "sdpa"
    if attn != "sdpa" and (device.type != "cuda" or not low):
        raise ValueError(f"attn={attn!r} needs CUDA and float16 or bfloat16, got {device.type} and {dtype}; use attn='sdpa'")
    if attn == "flash_attn_4" and not _has_flash_attn_4():
        raise ValueError("attn='flash_attn_4' needs the flash-attn-4 package; pip install --pre flash-attn-4, or use attn='varlen'")
    if attn == "flash_attn_4" and not flash_attn_4_takes(128, _capability(device)):
        raise ValueError(
            f"attn='flash_attn_4' needs compute capability 9 to 12 (Hopper, Blackwell), got {_capability(device)}; use attn='auto'"
        )
    if attn == "flash_attn" and not _has_flash_attn():
        raise ValueError("attn='flash_attn' needs the flash-attn package; pip install flash-attn, or use attn='varlen'")
    if attn == "varlen" and not _has_varlen():
        raise ValueError(f"attn='varlen' needs torch 2.11 or newer, got torch {torch.__version__}; use attn='sdpa'")
    return attn


def _has_flash_attn() -> bool:
    """Whether flash-attn 2 is here. flash-attn 4 alone is a folder of the same name without a file of its own."""
    from importlib.util import find_spec

    spec = find_spec("flash_attn")
    return spec is not None and spec.origin is not None


@cache
def _has_flash_attn_4() -> bool:
    from importlib.metadata import distributions

    return any(True for _ in distributions(name="flash-attn-4"))


@cache
def _capability(device: torch.device) -> int:
    """Major number of a card's compute capability; 0 where there is none."""
    return torch.cuda.get_device_capability(device)[0] if torch.cuda.is_available() and device.type == "cuda" else 0


def _has_varlen() -> bool:
    """Whether torch's varlen attention is one that `varlen_packed` can call: torch 2.10's has no window."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"scale", "window_size"} <= _parameters(varlen_attn)


def _attention_interface(module, query, key, value, attention_mask, scaling=None, dropout=0.0, segments=None, **kwargs):
    """transformers' calling convention: (1, H, T, D) in, (1, T, H, D) out."""
    if segments is None and kwargs.get("cu_seq_lens_q") is not None:
        # The module was called by somebody else than our backbones: a vision tower says its boundaries flash attention's way.
        boundaries = kwargs["cu_seq_lens_q"]
        segments = Segments.from_lengths(boundaries.diff().tolist(), causal=getattr(module, "is_causal", False)).to(query.device)
    if segments is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if isinstance(segments, tuple):  # a tower with windowed and full layers: the layer says which by its boundaries
        segments = next(s for s in segments if s.cu_seqlens is kwargs["cu_seq_lens_q"])
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    window = kwargs.get("sliding_window")
    out = packed_attention(q, k, v, segments, scale=scaling, dropout=dropout, window=window)
    return out.unsqueeze(0), None


def _mask_interface(*args, attention_mask=None, **kwargs):
    """No mask for packed calls, which pass none (building one would be T x T); SDPA's own mask for padded ones."""
    if attention_mask is None:
        return None
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


def register() -> None:
    """Add the packed attention to transformers' registries; harmless when repeated."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for name in (TEXT_ATTENTION, VISION_ATTENTION):
        ALL_ATTENTION_FUNCTIONS.register(name, _attention_interface)
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, _mask_interface)
