"""Distillation from embeddings: each row's softmax over the targets is drawn to a teacher's, of which the vectors are known.

    loss_i = KL(P_i || Q_i) = sum_j P_ij (log P_ij - log Q_ij),   P_i = softmax(teacher_i / T'),  Q_i = softmax(student_i / T)

Row i's own target p stands apart, as in the contrastive losses (softmax.py): with x = log(sum of the others' exp) - s_p of either model,

    1 - P_ip = sigmoid(x'),   loss_i = sigmoid(x') (mean_j (s'_ij - s_ij) - (s'_ip - s_ip)) + log(1 + exp(x)) - log(1 + exp(x')),
    d loss_i / d s_ip = sigmoid(x') - sigmoid(x)

with the mean over the others by the teacher's probabilities, so that rows of which both models are sure lose no digits. Rows without
a target of their own (`symmetric` with more targets than queries) have no such term.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.distributed as dist

from ..options import InfoNCEOptions
from .distributed import check_equal_shards, gather, scatter
from .gradients import Computed, Gradients, finish_gradients
from .problem import Columns, Direction, Problem, build, directions, own_columns
from .softmax import RowSums
from .workspace import workspace_bytes

NO_COLUMN = -1
CELL_BYTES = 12  # float32 logits of both models, and the difference of their probabilities


@dataclasses.dataclass
class Side:
    """One model's logits: its rows, and their softmax over all columns."""

    problem: Problem
    direction: Direction
    anchored: bool  # whether each row has a target of its own

    @functools.cached_property
    def anchor_logit(self) -> torch.Tensor:
        """(n,) logits of the rows' own targets, -inf where they have none."""
        logit = self.problem.positive * self.problem.inverse_temperature
        return logit if self.anchored else torch.full_like(logit, float("-inf"))


@dataclasses.dataclass
class DistillationSums:
    """Running sums of the rows over their columns, the own target left out.

    Args:
        student, teacher: of exp(logit - shift). gap: (n,) of exp(teacher - its shift) (teacher - student).
    """

    student: RowSums
    teacher: RowSums
    gap: torch.Tensor

    @classmethod
    def empty(cls, rows: int, dtype, device) -> DistillationSums:
        student, teacher = (RowSums.empty(rows, dtype, device, False) for _ in range(2))
        return cls(student, teacher, torch.zeros(rows, dtype=dtype, device=device))

    def add(self, rows: slice, student: RowSums, teacher: RowSums, gap: torch.Tensor) -> None:
        """Merge some columns' sums of `rows`."""
        self.student.add(rows, student)
        before = self.teacher.shift[rows].clone()
        self.teacher.add(rows, teacher)
        after = torch.where(self.teacher.shift[rows] == float("-inf"), 0, self.teacher.shift[rows])
        self.gap[rows] = self.gap[rows] * (before - after).exp() + gap * (teacher.shift - after).exp()


def finish(sums: DistillationSums, student: Side, teacher: Side, rows: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
    """(r,) losses of these rows, and (r,) derivatives with respect to the logit of the row's own target, by float64.

    sums: of these rows alone.
    """
    student_log, teacher_log = (_log_sum(side) for side in (sums.student, sums.teacher))
    mean_gap = torch.where(sums.teacher.total != 0, sums.gap.double() / sums.teacher.total.double(), 0)
    if student.anchored:
        s, t = student.anchor_logit[rows].double(), teacher.anchor_logit[rows].double()
        x, y = student_log - s, teacher_log - t
        log_sigmoid = torch.nn.functional.logsigmoid
        loss = torch.sigmoid(y) * (mean_gap - (t - s)) + log_sigmoid(-y) - log_sigmoid(-x)
        slope = torch.sigmoid(y) - torch.sigmoid(x)
    else:
        loss, slope = mean_gap - (teacher_log - student_log), torch.zeros_like(mean_gap)
    return loss.clamp(min=0).to(sums.gap.dtype), slope.to(sums.gap.dtype)  # below 0 by rounding alone; a NaN stays


def _log_sum(sums: RowSums) -> torch.Tensor:
    return torch.where(sums.total != 0, sums.shift.double() + sums.total.double().log(), float("-inf"))


def compute(
    query: torch.Tensor,
    target: torch.Tensor,
    teacher_query: torch.Tensor,
    teacher_target: torch.Tensor,
    temperature: float | torch.Tensor,
    teacher_temperature: float,
    weight: torch.Tensor | None,
    *,
    symmetric: bool,
    normalize: bool,
    reduction: str,
    group: dist.ProcessGroup | None,
    workspace_mib: float | None,
    backend,
    wanted: frozenset[str],
) -> Computed:
    """Loss and the gradients in `wanted`: of "query", "target", "temperature"."""
    with torch.no_grad(), torch.autocast(device_type=query.device.type, enabled=False):
        if torch.float64 in {x.dtype for x in (query, target, teacher_query, teacher_target)}:
            query, target, teacher_query, teacher_target = (x.double() for x in (query, target, teacher_query, teacher_target))
        common = {"normalize": normalize, "group": group, "workspace_mib": workspace_mib}
        student_options = InfoNCEOptions(temperature=temperature, weight=weight, reduction=reduction, **common)
        teacher_options = InfoNCEOptions(temperature=teacher_temperature, reduction="sum", **common)
        forward = _one_direction((query, target), (teacher_query, teacher_target), student_options, teacher_options, wanted, backend)
        if not symmetric:
            return forward
        swap = {"query": "target", "target": "query"}
        wanted = frozenset(swap.get(name, name) for name in wanted)
        reverse = _one_direction((target, query), (teacher_target, teacher_query), student_options, teacher_options, wanted, backend)
        reverse.d_query, reverse.d_target = reverse.d_target, reverse.d_query
        return _mean(forward, reverse)


def _mean(a: Computed, b: Computed) -> Computed:
    both = ((getattr(a, name), getattr(b, name)) for name in ("loss", "d_query", "d_target", "d_hard_negatives", "d_temperature"))
    return Computed(*(None if x is None else x.add_(y).mul_(0.5) for x, y in both))


def _one_direction(student, teacher, student_options, teacher_options, wanted, backend) -> Computed:
    """Rows of the first matrix of each pair over the second's."""
    group, (rows, columns) = student_options.group, student
    rank, all_sum = 0, lambda x: x
    if group is not None:
        rank = dist.get_rank(group)
        check_equal_shards(rows, columns, student_options.validate, group)

        def all_sum(tensor):
            dist.all_reduce(tensor, group=group)
            return tensor

    sides = [_side(*pair, options, backend, rank, all_sum) for pair, options in ((student, student_options), (teacher, teacher_options))]
    problem, direction = sides[0].problem, sides[0].direction
    gradients = Gradients(problem, wanted) if wanted else None
    loss, slope = backend.distill(*sides, gradients, workspace_bytes(student_options, rows, columns, CELL_BYTES))
    loss = torch.where(direction.weight != 0, direction.weight * loss, 0)
    out = Computed(loss if student_options.reduction == "none" else loss.sum())
    if gradients is not None:
        if sides[0].anchored:
            gradients.add_positives(direction, slope * direction.weight * problem.inverse_temperature)
        if group is not None:
            scatter(gradients, "all_targets", "target", columns, group)
            for accumulator in gradients.accumulators.values():
                accumulator.mul_(dist.get_world_size(group))
            if gradients.wants("temperature"):
                gradients.temperature *= dist.get_world_size(group)
        finish_gradients(problem, gradients, out)
    if group is not None:
        out.loss = all_sum(out.loss)
    return out


def _side(rows, columns, options: InfoNCEOptions, backend, rank: int, all_sum) -> Side:
    """One model's rows over the columns of all ranks."""
    anchored = len(columns) % len(rows) == 0
    if not anchored:  # a problem wants positives; theirs are not looked at
        options = options.replace(positives=torch.zeros(len(rows), dtype=torch.int64, device=rows.device))
    problem = build(rows, columns, options, backend, rank, all_sum)
    queries, targets = own_columns(problem)
    if options.group is not None:
        targets = gather(targets, "all_targets", options.group)
    direction = directions(problem, queries, targets)[0]
    if not anchored:
        _without_anchor(direction, targets)
    return Side(problem, direction, anchored)


def _without_anchor(direction: Direction, targets: Columns) -> None:
    block = direction.blocks[0]
    columns = dataclasses.replace(targets, offset=0)
    direction.blocks[0] = dataclasses.replace(block, columns=columns, exclude=torch.full_like(block.exclude, NO_COLUMN))
