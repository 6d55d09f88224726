"""What a training loop logs about its batch, computed beside the loss and left on the device."""

from __future__ import annotations

import dataclasses

import torch

STAT_SUMS = 7  # numbers that `row_sums` adds up


@dataclasses.dataclass(frozen=True)
class InfoNCEStats:
    """0-d tensors, equal on all ranks of a group; of the forward direction and, with Matryoshka, the widest level.

    Args:
        logsumexp: mean over the rows that count of the log-sum-exp of their logits, in nats.
        accuracy: share of these rows whose positive has a greater cosine than every negative of theirs.
        positive_cosine: mean cosine of query and positive.
        hardest_negative_cosine: mean, over the rows that have a negative, of their greatest negative cosine.
        rows_masked: how many rows do not count: `ignore_index`, a masked query or a masked positive.

    Example:
        >>> import torch
        >>> from contrastive_kernels import info_nce
        >>> _, stats = info_nce(torch.eye(4), torch.eye(4), return_stats=True)
        >>> float(stats.accuracy), float(stats.positive_cosine), float(stats.hardest_negative_cosine)
        (1.0, 1.0, 0.0)
    """

    logsumexp: torch.Tensor
    accuracy: torch.Tensor
    positive_cosine: torch.Tensor
    hardest_negative_cosine: torch.Tensor
    rows_masked: torch.Tensor

    @classmethod
    def unpack(cls, sums: torch.Tensor) -> InfoNCEStats:
        """From the (7,) sums of `row_sums`, added over ranks."""
        lse, right, positive, hardest, rows, with_negative, rows_all = sums.unbind()
        count, having = rows.clamp(min=1), with_negative.clamp(min=1)
        return cls(lse / count, right / count, positive / count, hardest / having, rows_all - rows)


def row_sums(active: torch.Tensor, lse: torch.Tensor, positive: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    """(7,) sums over the rows that count. All (n,): bool, log-sum-exp, positive's cosine, best negative's or -inf."""
    weight = active.to(lse.dtype)
    having = active & (best > float("-inf"))
    none = torch.zeros((), dtype=lse.dtype, device=lse.device)
    columns = [
        torch.where(active, lse, none),
        (active & (positive > best)).to(lse.dtype),
        torch.where(active, positive, none),
        torch.where(having, best, none),
        weight,
        having.to(lse.dtype),
        torch.ones_like(weight),
    ]
    return torch.stack([column.sum() for column in columns])
