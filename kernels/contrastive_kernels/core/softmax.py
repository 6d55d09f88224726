"""Row softmaxes over several blocks of candidates, the positive kept apart.

    x_i = log(sum of negatives' exp) - s_i,positive        loss_i = log(1 + exp(x_i))        1 - p_positive = sigmoid(x_i)

Nothing here subtracts numbers that are nearly equal: `softmax - 1` would. E overwrites the logits, and the row's
normaliser comes back as a factor that the caller folds into the other operand of its products.
"""

from __future__ import annotations

import dataclasses

import torch

# |logit| up to which exp needs no running maximum: e^60 * 2^20 columns is far inside float32, e^-60 far above its least.
SAFE_LOGIT = 60.0
# exp below it counts as 0 where a row's maximum is subtracted: the square of e^-43 is still a normal float32, and products of
# denormal numbers cost a hundred times more than others. 2e-19 of the greatest term is far below float32's precision.
NEGLIGIBLE = {torch.float32: -43.0, torch.float64: -350.0}


@dataclasses.dataclass
class RowSums:
    """Running sums of one row's negatives, (n,) each: exp(logit - shift) summed, and what options need besides."""

    shift: torch.Tensor
    total: torch.Tensor
    best: torch.Tensor  # greatest cosine of a negative, -inf where there is none
    logits: torch.Tensor | None = None  # sum of the negatives' logits, for label smoothing
    count: torch.Tensor | None = None  # their number
    matrix: torch.Tensor | None = None  # (5, n) where the fields above are its rows, as the kernels take them

    @classmethod
    def empty(cls, rows: int, dtype, device, smoothing: bool) -> RowSums:
        sums = cls.unfilled(rows, dtype, device, smoothing)
        sums.matrix.zero_()
        sums.shift.fill_(float("-inf"))
        sums.best.fill_(float("-inf"))
        return sums

    @classmethod
    def unfilled(cls, rows: int, dtype, device, smoothing: bool) -> RowSums:
        """Sums whose memory holds nothing yet."""
        matrix = torch.empty(5, rows, dtype=dtype, device=device)
        return cls(*matrix[:3], *(matrix[3:] if smoothing else (None, None)), matrix=matrix)

    def add(self, rows: slice, other: RowSums) -> None:
        """Merge another block's sums of the same rows."""
        shift = torch.maximum(self.shift[rows], other.shift)
        safe = torch.where(shift == float("-inf"), 0, shift)
        self.total[rows] = self.total[rows] * (self.shift[rows] - safe).exp() + other.total * (other.shift - safe).exp()
        self.shift[rows] = shift
        self.best[rows] = torch.maximum(self.best[rows], other.best)
        if self.logits is not None:
            self.logits[rows] += other.logits
            self.count[rows] += other.count

    def rows(self, rows: slice) -> RowSums:
        """Views of some rows."""
        return RowSums(*(None if x is None else x[rows] for x in (self.shift, self.total, self.best, self.logits, self.count)))

    def log_sum(self) -> torch.Tensor:
        """(n,) log of the negatives' sum, -inf where there is none."""
        return torch.where(self.total != 0, self.shift + self.total.log(), float("-inf"))


@dataclasses.dataclass
class RowResult:
    """What a finished row gives: (n,) each."""

    loss: torch.Tensor
    log_sum: torch.Tensor  # log of the negatives' sum
    lse: torch.Tensor  # log-sum-exp over all candidates
    positive: torch.Tensor  # d loss / d s_positive
    smooth: torch.Tensor | None  # label smoothing's share of each candidate
    weighted: torch.Tensor | None = None  # loss times the row's weight, 0 where that is 0, where it is known already


def finish(sums: RowSums, positive_logit: torch.Tensor, smoothing: float) -> RowResult:
    """Row losses and the derivative with respect to the positive's logit."""
    log_sum = sums.log_sum()
    x = log_sum - positive_logit
    # -logsigmoid(-x) is log(1 + e^x) without softplus's cut to x above 20, which costs float64 half its digits
    loss = -torch.nn.functional.logsigmoid(-x)
    lse = positive_logit + loss
    gradient = -torch.sigmoid(x)
    smooth = None
    if smoothing:
        candidates = sums.count + 1
        smooth = smoothing / candidates
        loss = loss + smoothing * positive_logit - smooth * (positive_logit + sums.logits)
        gradient = gradient + smoothing - smooth
    return RowResult(loss, log_sum, lse, gradient, smooth)


def row_factor(sums: RowSums, positive_logit: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """(n,) what turns E = exp(logit - shift) into probabilities: sigmoid(x) / total, 0 for a row without negatives.

    As a quotient of sums it is exact to rounding where exp(shift - lse) would carry the error of lse itself. A row whose only
    negatives are hard ones may have a smaller shift than E's: its E is 0, and the factor must not be infinite.
    """
    share = torch.sigmoid(sums.log_sum() - positive_logit)
    return torch.where(sums.total != 0, share * (shift - sums.shift).clamp(max=0).exp() / sums.total, 0)


def mask_logits(logits, block, rows: slice, threshold, active, dead_columns, minus: float = float("-inf")) -> None:
    """Set to `minus`, in place, what is no negative of rows `rows`. `logits` (r, C) is scale * cos.

    `dead_columns` are the indices where `block.columns.keep` is False, known beforehand where that needs no wait for a GPU:
    a few columns are cheaper to fill than a whole mask is to apply.
    """
    for row_ids, column_ids in block.ids:
        # a mask that lies as the logits do: against their grain, filling takes ten times as long
        if logits.stride(0) == 1:
            logits.T.masked_fill_(column_ids[:, None] == row_ids[None, rows], minus)
        else:
            logits.masked_fill_(row_ids[rows, None] == column_ids[None, :], minus)
    if threshold is not None:
        logits.masked_fill_(logits > (threshold[rows] * block.scale)[:, None], minus)
    if dead_columns is not None:
        logits.index_fill_(1, dead_columns, minus)
    elif block.columns.keep is not None:
        logits.masked_fill_(~block.columns.keep[None, :], minus)
    if active is not None:
        logits.masked_fill_(~active[rows, None], minus)
    fill_excluded(logits, block, rows, minus)


def fill_excluded(logits, block, rows: slice, value: float) -> None:
    """Set to `value`, in place, the entry of each row that is the row itself or its positive, where it is among these columns."""
    column = block.exclude[rows]
    if block.columns.offset is None:
        logits.scatter_(1, column[:, None], value)
    else:
        column = column - block.columns.offset
        inside = (column >= 0) & (column < logits.shape[1])
        column = torch.where(inside, column, 0)[:, None]
        logits.scatter_(1, column, torch.where(inside[:, None], value, logits.gather(1, column)))


def cut_negligible(shifted) -> None:
    """Set to -inf, in place, the exponents whose exponentials do not count."""
    torch.threshold_(shifted, NEGLIGIBLE[shifted.dtype], float("-inf"))


def reduce_logits(logits, scale, fixed: bool, smoothing: bool, want_best: bool):
    """Sum masked logits (r, C). In place they become E = exp(logit - shift).

    Args:
        scale: what turned a cosine into a logit.
        fixed: the caller knows that no logit exceeds SAFE_LOGIT: shift 0, no maximum is taken.
        smoothing: also sum and count the logits. want_best: also take the greatest cosine.

    Returns:
        RowSums of these rows, whose shift is E's and -inf where a row has no candidate; a bool mask of the dropped, or None.
    """
    minus = float("-inf")
    zeros = logits.new_zeros(logits.shape[0])
    shift, best, dropped = zeros, zeros + minus, None
    if not fixed or want_best:
        top = logits.amax(1)
        best = top / scale
        if not fixed:
            shift = torch.where(top == minus, 0, top)
            logits.sub_(shift[:, None])  # label smoothing sums them first, so small ones are not cut off here
    sums = RowSums(shift, zeros, best)
    if smoothing:
        dropped = logits == minus
        sums.count = logits.shape[1] - dropped.view(torch.uint8).sum(1, dtype=logits.dtype)
        # the shift that was taken off each logit comes back at once
        sums.logits = logits.nan_to_num(neginf=0).sum(1) + sums.count * shift
    if not fixed:
        cut_negligible(logits)
    sums.total = logits.exp_().sum(1)
    sums.shift = torch.where(sums.total != 0, shift, minus)
    return sums, dropped
