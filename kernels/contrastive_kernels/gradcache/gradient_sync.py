"""One gradient synchronisation per GradCache step, however many backward passes the step makes.

DistributedDataParallel would reduce on every backward and wants every trained parameter used in the last one; a chunk
of text alone leaves the vision tower unused. So all chunks run under `no_sync` and the accumulated gradients are
averaged once, at the end, in flat buckets. FSDP2 reduces in the hooks of a module's last chunk alone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

_BUCKET_BYTES = 64 * 2**20


class GradientSync:
    """What wrapped modules need around the backward passes of one step.

    Args:
        modules: what the encoders call: one module or several, plain, DistributedDataParallel, or sharded by `fully_shard`.
            None: a single process, or gradients that the caller synchronises.

    Raises:
        ValueError: where the wrapped modules are spread over different ranks.
    """

    def __init__(self, modules: torch.nn.Module | Sequence[torch.nn.Module] | None):
        given = () if modules is None else (modules,) if isinstance(modules, torch.nn.Module) else tuple(modules)
        self.modules = tuple({id(module): module for module in given}.values())
        self.ddp = [m for m in self.modules if isinstance(m, torch.nn.parallel.DistributedDataParallel)]
        self.sharded = [m for m in self.modules if hasattr(m, "set_requires_gradient_sync")]
        groups = self._groups()
        if len({tuple(dist.get_process_group_ranks(group)) for group in groups}) > 1:
            raise ValueError("expected modules wrapped over one process group, got several; wrap all of them over the same ranks")

    @property
    def is_fsdp(self) -> bool:
        return bool(self.sharded)

    def parameters(self) -> list[torch.nn.Parameter]:
        """Trained parameters of all modules, each once."""
        return list({id(p): p for module in self.modules for p in module.parameters() if p.requires_grad}.values())

    def _groups(self) -> list[dist.ProcessGroup]:
        groups = [module.process_group for module in self.ddp]
        for module in self.sharded:
            meshes = [p.device_mesh for p in module.parameters() if hasattr(p, "device_mesh")]
            if dist.is_initialized():
                groups.append(meshes[0].get_group() if meshes and meshes[0].ndim == 1 else dist.group.WORLD)
        return groups

    @functools.cached_property
    def group(self) -> dist.ProcessGroup | None:
        """Process group over which the modules are spread; None where they are not."""
        return next(iter(self._groups()), None)

    @functools.cached_property
    def device(self) -> torch.device:
        """Device of small tensors on which ranks agree."""
        for module in self.sharded:
            for parameter in module.parameters():
                if hasattr(parameter, "device_mesh"):
                    return torch.device(parameter.device_mesh.device_type)  # weights themselves may wait in host memory
        return next((p.device for module in self.modules for p in module.parameters()), torch.device("cpu"))

    def largest(self, values: list[int]) -> list[int]:
        """Element by element the largest of any rank. Collective where the modules are spread over ranks."""
        if self.group is None:
            return values
        agreed = torch.tensor(values, device=self.device, dtype=torch.int64)
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=self.group)
        return agreed.tolist()

    # Parts of a step: with several sharded modules each part runs the same modules on every rank.

    @property
    def parts(self) -> int:
        """Parts of a step whose chunks ranks must run in step: the collectives of one module answer each other."""
        return 2 if len(self.sharded) > 1 else 1

    def part(self, side: int) -> int:
        """The part that a side's chunks belong to: with several sharded modules, hard negatives go with the target."""
        return min(side, 1) if self.parts > 1 else 0

    def common_counts(self, counts: list[int]) -> list[int]:
        """The largest counts of any rank where every rank must make as many passes (FSDP2's forward is collective)."""
        return self.largest(counts) if self.is_fsdp else counts

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Every backward in this context accumulates locally."""
        with contextlib.ExitStack() as stack:
            for module in self.ddp:
                stack.enter_context(module.no_sync())
            for module in self.sharded:
                module.set_requires_gradient_sync(False)
                stack.callback(module.set_requires_gradient_sync, True)
            yield

    @contextlib.contextmanager
    def last_backward(self) -> Iterator[None]:
        """Context of a part's last backward: FSDP2 reduces there, DDP afterwards in `finish`."""
        with contextlib.ExitStack() as stack:
            for module in self.ddp:
                stack.enter_context(module.no_sync())
            yield

    @torch.no_grad()
    def finish(self, others: Sequence[torch.Tensor] = ()) -> None:
        """Averages over the ranks every accumulated gradient that FSDP2 has not reduced. Collective.

        Args:
            others: leaves besides the modules' parameters, such as a learned temperature; on every rank the same.
        """
        if self.group is None:
            return
        most, least = self.largest([len(others), -len(others)])
        if most != -least:
            raise ValueError(
                f"loss: expected the same learned tensors on every rank, got {-least} to {most} of them; give it the same ones everywhere"
            )
        world_size = dist.get_world_size(self.group)
        parameters = [p for p in self.parameters() if not hasattr(p, "device_mesh")]
        known = {id(p) for p in parameters}
        parameters += [leaf for leaf in others if id(leaf) not in known]
        if not parameters or world_size == 1:
            return
        # A rank whose rows never touched a parameter has no gradient there, others may: zeros stand in for it. A
        # parameter that no rank used keeps None, so that the optimizer leaves it alone as on one process.
        used = self.largest([int(p.grad is not None) for p in parameters])
        gradients = []
        for parameter, is_used in zip(parameters, used, strict=True):
            if is_used:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        for bucket in _buckets(gradients):
            flat = torch.cat([g.reshape(-1) for g in bucket]) if len(bucket) > 1 else bucket[0].contiguous().view(-1)
            flat = flat.to(self.device)  # a learned temperature may lie in host memory
            dist.all_reduce(flat, group=self.group)
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
