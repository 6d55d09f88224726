"""The definitions, dense and in plain PyTorch: what every fast path is judged by. Dtype-generic, differentiable by autograd.

Legend: N queries, M targets, D width, K hard negatives of a query, C candidates of all blocks of a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .options import InfoNCEOptions
from .stats import InfoNCEStats

EPS = 1e-12


def _normalize(x, eps=EPS):
    """x / max(|x|, eps); a row shorter than eps has no direction and gets no gradient."""
    norm = x.norm(dim=-1, keepdim=True)
    return torch.where(norm > eps, x / norm.clamp(min=eps), (x / eps).detach())


def last_token_pool_reference(hidden, *, attention_mask=None, cu_seqlens=None, normalize=True, eps=EPS):
    """Row by row: the last position that is attended to, or the last token of each packed sample; zeros where there is none."""
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        samples = [hidden[start:end] for start, end in zip(ends, ends[1:])]
    else:
        samples = [h[m != 0] for h, m in zip(hidden, attention_mask)]
    rows = torch.stack([sample[-1] if len(sample) else hidden.new_zeros(hidden.shape[-1]) for sample in samples])
    return _normalize(rows, eps) if normalize else rows


def pooled_info_nce_reference(
    query_hidden,
    target_hidden,
    *,
    query_attention_mask=None,
    query_cu_seqlens=None,
    target_attention_mask=None,
    target_cu_seqlens=None,
    **options,
):
    """Pool, then the loss, which normalises."""
    query = last_token_pool_reference(query_hidden, attention_mask=query_attention_mask, cu_seqlens=query_cu_seqlens, normalize=False)
    target = last_token_pool_reference(target_hidden, attention_mask=target_attention_mask, cu_seqlens=target_cu_seqlens, normalize=False)
    return info_nce_reference(query, target, **{"normalize": True, **options})


def topk_similarity_reference(query, target, k, *, exclude=None):
    """Sort every row of the dense product; of equal scores the lowest index comes first."""
    scores = query @ target.T
    if exclude is not None:
        for row, dropped in zip(scores, exclude.tolist()):
            row[[g for g in dropped if g >= 0]] = float("-inf")
    best, index = scores.sort(dim=1, descending=True, stable=True)
    best, index = F.pad(best[:, :k], (0, max(0, k - best.shape[1])), value=float("-inf")), index[:, :k]
    index = F.pad(index, (0, max(0, k - index.shape[1])), value=-1)
    return best, index.masked_fill(best == float("-inf"), -1)


def sigmoid_loss_reference(
    query,
    target,
    *,
    scale,
    bias,
    normalize=False,
    positives=None,
    query_ids=None,
    target_ids=None,
    ignore_index=-100,
    query_mask=None,
    target_mask=None,
    weight=None,
    reduction="mean",
):
    """SigLIP: -sum over pairs of log sigmoid(z (scale q.t + bias)), z = +1 where the pair belongs together, else -1."""
    n, m = len(query), len(target)
    if normalize:
        query, target = _normalize(query), _normalize(target)
    label, rows = pair_labels(n, m, positives, query_ids, target_ids, ignore_index, query.device)
    if query_mask is not None:
        rows = rows & query_mask
        query = torch.where(query_mask[:, None], query, 0)
    columns = torch.ones(m, dtype=torch.bool, device=query.device) if target_mask is None else target_mask
    target = torch.where(columns[:, None], target, 0)
    z = torch.where(label, 1.0, -1.0).to(query.dtype)
    pair = -F.logsigmoid(z * (scale * (query @ target.T) + bias))
    row = torch.where(rows[:, None] & columns, pair, 0).sum(1)
    w = torch.where(rows, torch.ones_like(row) if weight is None else weight.to(row.dtype), 0)
    row = row * w
    if reduction == "none":
        return row
    return row.sum() if reduction == "sum" else row.sum() / torch.where(w.sum() == 0, 1, w.sum())


def distillation_loss_reference(
    query,
    target,
    teacher_query,
    teacher_target,
    *,
    temperature=0.02,
    teacher_temperature=0.02,
    symmetric=False,
    normalize=False,
    weight=None,
    query_mask=None,
    target_mask=None,
    reduction="mean",
):
    """KL of the student's softmax from the teacher's, row by row; `symmetric` takes the mean with the transposed matrices' loss."""
    n, m = len(query), len(target)
    rows = torch.ones(n, dtype=torch.bool, device=query.device) if query_mask is None else query_mask
    columns = torch.ones(m, dtype=torch.bool, device=query.device) if target_mask is None else target_mask
    query, teacher_query = (torch.where(rows[:, None], x, 0) for x in (query, teacher_query))
    target, teacher_target = (torch.where(columns[:, None], x, 0) for x in (target, teacher_target))
    if normalize:
        query, target, teacher_query, teacher_target = (_normalize(x) for x in (query, target, teacher_query, teacher_target))
    by_row = isinstance(temperature, torch.Tensor) and temperature.dim() == 1
    temperature = temperature[:, None] if by_row else temperature
    teacher = (teacher_query @ teacher_target.T / teacher_temperature).detach()

    def one_direction(student, teacher, rows, columns):
        if len(columns) % len(rows) == 0:  # rows have targets of their own
            rows = rows & columns[:: len(columns) // len(rows)]
        student, teacher = (x.masked_fill(~columns, -1e30) for x in (student, teacher))
        row = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="none", log_target=True)
        row = torch.where(columns, row, 0).sum(1)
        w = torch.where(rows, torch.ones_like(row) if weight is None else weight.to(row.dtype), 0)
        row = torch.where(rows, row, 0) * w
        if reduction == "none":
            return row
        return row.sum() if reduction == "sum" else row.sum() / torch.where(w.sum() == 0, 1, w.sum())

    forward = one_direction(query @ target.T / temperature, teacher, rows, columns)
    if not symmetric:
        return forward
    return 0.5 * (forward + one_direction(target @ query.T / temperature, teacher.T, columns, rows))


def pair_labels(n, m, positives, query_ids, target_ids, ignore_index, device):
    """(N, M) bool of pairs that belong together, and (N,) bool of rows that count."""
    rows = torch.ones(n, dtype=torch.bool, device=device)
    if query_ids is not None:
        return (query_ids[:, None] == target_ids[None, :]) & (query_ids != -1)[:, None], rows
    if positives is None:
        positives = torch.arange(n, device=device) * (m // n)
    rows = positives != ignore_index
    label = F.one_hot(torch.where(rows, positives, 0), m).bool() & rows[:, None]
    if target_ids is not None:
        positive_ids = target_ids[torch.where(rows, positives, 0)]
        label = label | ((positive_ids[:, None] == target_ids[None, :]) & ((positive_ids != -1) & rows)[:, None])
    return label, rows


def info_nce_reference(query, target, **options):
    """`info_nce` by its definition: every logit of every block side by side, one cross entropy a row.

    `group`, `exchange`, `workspace_mib` and `backend` say how a result is computed and are left aside.
    """
    o = InfoNCEOptions.make(options)
    dims = o.matryoshka_dims or (query.shape[1],)
    weights = o.matryoshka_weights or (1.0,) * len(dims)
    total, stats = 0.0, None
    for dim, level_weight in zip(dims, weights):
        hard = None if o.hard_negatives is None else _padded(o.hard_negatives, o.hard_offsets)[..., :dim]
        q, t = query[:, :dim], target[:, :dim]
        if o.query_mask is not None:
            q = torch.where(o.query_mask[:, None], q, 0)
        if o.target_mask is not None:
            t = torch.where(o.target_mask[:, None], t, 0)
        if o.normalize or o.matryoshka_dims is not None:
            q, t, hard = _normalize(q), _normalize(t), None if hard is None else _normalize(hard)
        loss, level_stats = _level(q, t, hard, o)
        total = total + level_weight * loss
        if dim == max(dims):
            stats = level_stats
    return (total, stats) if o.return_stats else total


def _padded(values, offsets, fill=0.0):
    """Packed (H, ...) by offsets to (N, K, ...); what is dense already comes back as it is."""
    if offsets is None:
        return values
    pieces = values.split(offsets.diff().tolist())
    longest = max(max(len(p) for p in pieces), 1)
    return torch.stack([torch.cat([p, p.new_full((longest - len(p), *p.shape[1:]), fill)]) for p in pieces])


def _level(q, t, hard, o):
    n, m, device = len(q), len(t), q.device
    minus = float("-inf")
    if o.positives is None:
        p, active = torch.arange(n, device=device) * (m // n), torch.ones(n, dtype=torch.bool, device=device)
    else:
        active = o.positives != o.ignore_index
        p = torch.where(active, o.positives, 0)
    has_positive = active
    is_query = torch.ones(n, dtype=torch.bool, device=device) if o.query_mask is None else o.query_mask
    is_candidate = torch.ones(m, dtype=torch.bool, device=device) if o.target_mask is None else o.target_mask
    active = active & is_query & is_candidate[p]

    positive = (q * t[p]).sum(-1)
    limit = torch.full((n,), float("inf"), dtype=q.dtype, device=device)
    if o.mask_margin is not None:
        limit = torch.minimum(limit, positive.detach() + o.mask_margin)
    if o.mask_relative is not None:
        limit = torch.minimum(limit, positive.detach() + o.mask_relative * positive.detach().abs())
    in_batch = o.hardness if o.hardness_scope in ("all", "in_batch") else 0.0
    of_hard = o.hardness if o.hardness_scope in ("all", "hard") else 0.0
    sees_batch = torch.ones(n, dtype=torch.bool, device=device) if o.own_negatives_only is None else ~o.own_negatives_only
    me = torch.arange(n, device=device)

    def same(a, b):
        return (a[:, None] == b[None, :]) & (a != -1)[:, None]

    def block(cos, excluded, columns, hardness=in_batch, batch=True):
        """Logits (N, C) of one block of negatives, -inf where dropped."""
        dropped = excluded | ~columns | (cos.detach() > limit[:, None])
        if batch:
            dropped = dropped | ~sees_batch[:, None]
        temperature = o.temperature[:, None] if isinstance(o.temperature, torch.Tensor) and o.temperature.dim() else o.temperature
        return (cos / temperature + hardness * cos.detach()).masked_fill(dropped, minus), cos.masked_fill(dropped, minus)

    def is_column(index, size):
        return index[:, None] == torch.arange(size, device=device)[None, :]

    no_target_match = torch.zeros(n, m, dtype=torch.bool, device=device)
    target_match = no_target_match if o.target_ids is None else same(o.target_ids[p], o.target_ids)
    query_match = torch.zeros(n, n, dtype=torch.bool, device=device)
    if o.query_ids is not None:
        query_match = same(o.query_ids, o.query_ids)

    excluded = is_column(p, m) | target_match
    if o.target_query_ids is not None:
        excluded = excluded | same(o.query_ids, o.target_query_ids)
    blocks = [block(q @ t.T, excluded, is_candidate)]
    if o.query_negatives:
        blocks.append(block(q @ q.T, is_column(me, n) | query_match, is_query))
    if o.target_negatives:
        blocks.append(block(t[p] @ t.T, excluded, is_candidate))
    if hard is not None:
        dropped = torch.zeros(hard.shape[:2], dtype=torch.bool, device=device)
        if o.hard_offsets is not None:
            dropped = torch.arange(hard.shape[1], device=device) >= o.hard_offsets.diff()[:, None]
        if o.hard_ids is not None:
            positive_ids = o.target_ids[p]
            dropped = dropped | ((_padded(o.hard_ids, o.hard_offsets, -1) == positive_ids[:, None]) & (positive_ids != -1)[:, None])
        blocks.append(block((q[:, None] * hard).sum(-1), dropped, torch.ones_like(dropped), of_hard, batch=False))
    loss = _rows(positive / o.temperature, blocks, o.label_smoothing)
    stats = _stats(positive, blocks, loss_lse(positive / o.temperature, blocks), active)
    if o.symmetric:
        # pairs whose queries share a positive, or positives of one id, are no negatives of the reverse direction
        shared = (p[:, None] == p[None, :]) & has_positive[:, None] & has_positive[None, :]
        shared = shared | query_match | (target_match[:, p] & has_positive[None, :])
        reverse = block(t[p] @ q.T, is_column(me, n) | shared, is_query)
        loss = (loss + _rows(positive / o.temperature, [reverse], o.label_smoothing)) / 2

    weight = torch.where(active, torch.ones_like(loss) if o.weight is None else o.weight.to(loss.dtype), 0)
    loss = torch.where(active, loss, 0) * weight
    if o.reduction == "mean":
        loss = loss.sum() / torch.where(weight.sum() == 0, 1, weight.sum())
    return (loss.sum() if o.reduction == "sum" else loss), stats


def loss_lse(positive, blocks):
    return torch.cat([positive[:, None], *(logits for logits, _ in blocks)], 1).logsumexp(1)


def _rows(positive, blocks, smoothing):
    logits = torch.cat([positive[:, None], *(logits for logits, _ in blocks)], 1)
    lse = logits.logsumexp(1)
    candidate = logits > float("-inf")
    mean = torch.where(candidate, logits, 0).sum(1) / candidate.sum(1)
    return lse - (1 - smoothing) * positive - smoothing * mean


def _stats(positive, blocks, lse, active) -> InfoNCEStats:
    best = torch.cat([cos for _, cos in blocks], 1).amax(1).detach()
    positive, count = positive.detach(), active.sum().clamp(min=1)
    having = active & (best > float("-inf"))
    return InfoNCEStats(
        logsumexp=torch.where(active, lse.detach(), 0).sum() / count,
        accuracy=(active & (positive > best)).to(positive.dtype).sum() / count,
        positive_cosine=torch.where(active, positive, 0).sum() / count,
        hardest_negative_cosine=torch.where(having, best, 0).sum() / having.sum().clamp(min=1),
        rows_masked=(~active).to(positive.dtype).sum(),
    )
