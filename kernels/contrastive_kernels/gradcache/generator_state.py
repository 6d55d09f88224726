"""Snapshots of torch's random generators, so that a forward pass can be run again with the same dropout masks."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GeneratorState:
    """State of the CPU generator and of every CUDA generator this process has used.

    Python's and NumPy's generators are not covered: an encoder that draws from them is not replayed.
    """

    cpu: torch.Tensor
    cuda: list[torch.Tensor]

    @classmethod
    def capture(cls) -> GeneratorState:
        used_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state_all() if used_cuda else [])

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
