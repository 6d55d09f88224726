"""One gradient synchronisation per GradCache step, however many backward passes the step makes.

DistributedDataParallel would reduce on every backward and wants every trained parameter used in the last one; a chunk
of text alone leaves the vision tower unused. So all chunks run under `no_sync` and the accumulated gradients are
averaged once, at the end, in flat buckets. FSDP2 reduces in the hooks of the last chunk alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist

_BUCKET_BYTES = 64 * 2**20


class GradientSync:
    """What a wrapped module needs around the backward passes of one step.

    Args:
        module: the module that the encoder calls: plain, DistributedDataParallel, or sharded by `fully_shard`.
            None: a single process, or gradients that the caller synchronises.
    """

    def __init__(self, module: torch.nn.Module | None):
        self.module = module
        self.is_ddp = isinstance(module, torch.nn.parallel.DistributedDataParallel)
        self.is_fsdp = module is not None and hasattr(module, "set_requires_gradient_sync")

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Process group over which chunk counts must agree; None where they need not."""
        if self.is_ddp:
            return self.module.process_group
        return dist.group.WORLD if self.is_fsdp and dist.is_initialized() else None

    def common_count(self, count: int, device: torch.device) -> int:
        """The largest `count` of any rank where every rank must make as many passes (FSDP2's forward is collective)."""
        if not self.is_fsdp or self.group is None:
            return count
        counts = torch.tensor(count, device=device)
        dist.all_reduce(counts, op=dist.ReduceOp.MAX, group=self.group)
        return int(counts)

    def on_any_rank(self, flag: bool) -> bool:
        """Whether `flag` holds on some rank of a DDP module; collective there, this process's own flag elsewhere."""
        if not self.is_ddp:
            return flag
        agreed = torch.tensor(int(flag), device=next(self.module.parameters()).device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=self.group)
        return bool(agreed)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Every backward in this context accumulates locally."""
        if self.is_ddp:
            with self.module.no_sync():
                yield
        elif self.is_fsdp:
            self.module.set_requires_gradient_sync(False)
            try:
                yield
            finally:
                self.module.set_requires_gradient_sync(True)
        else:
            yield

    def last_backward(self) -> contextlib.AbstractContextManager[None]:
        """Context of the step's last backward: FSDP2 reduces there, DDP afterwards in `finish`."""
        return contextlib.nullcontext() if self.is_fsdp else self.deferred()

    @torch.no_grad()
    def finish(self) -> None:
        """Averages the accumulated gradients of a DDP module over its ranks. Collective."""
        if not self.is_ddp:
            return
        group = self.group
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        if not parameters or dist.get_world_size(group) == 1:
            return
        # A rank whose rows never touched a parameter has no gradient there, others may: zeros stand in for it. A
        # parameter that no rank used keeps None, so that the optimizer leaves it alone as on one process.
        used = torch.tensor([p.grad is not None for p in parameters], device=parameters[0].device, dtype=torch.uint8)
        dist.all_reduce(used, op=dist.ReduceOp.MAX, group=group)
        gradients = []
        for parameter, is_used in zip(parameters, used.tolist(), strict=True):
            if is_used:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        world_size = dist.get_world_size(group)
        for bucket in _buckets(gradients):
            flat = torch.cat([g.reshape(-1) for g in bucket]) if len(bucket) > 1 else bucket[0].contiguous().view(-1)
            dist.all_reduce(flat, group=group)
            flat /= world_size
            for gradient, piece in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(piece.view_as(gradient))


def _buckets(gradients: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Runs of gradients of one dtype and device, each of at most `_BUCKET_BYTES` unless a single one is larger."""
    bucket: list[torch.Tensor] = []
    filled = 0
    for gradient in gradients:
        size = gradient.numel() * gradient.element_size()
        alike = bucket and bucket[0].dtype == gradient.dtype and bucket[0].device == gradient.device
        if bucket and (not alike or filled + size > _BUCKET_BYTES):
            yield bucket
            bucket, filled = [], 0
        bucket.append(gradient)
        filled += size
    if bucket:
        yield bucket
