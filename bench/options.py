"""What each option of the loss may cost over the plain loss, and how it is switched on for N = M rows of width D."""

from __future__ import annotations

import torch

NO_BLOCK, A_BLOCK = 1.15, 2 * 1.25  # an option without a block of logits; one that doubles the products
SYMMETRIC = 8 / 6 * 1.25  # both directions share their logits: 8 N M D against 6
MATRYOSHKA = 1.45


def cases(n: int, d: int) -> dict[str, tuple[dict, float]]:
    """Name: (options, most that it may take as a multiple of the plain loss)."""
    generator = torch.Generator().manual_seed(5)

    def some(share: float) -> torch.Tensor:
        return torch.rand(n, generator=generator) < share

    ids = torch.randint(0, n, (n,), generator=generator)
    dims = tuple(width for width in (d // 8, d // 4, d // 2, d) if width)
    return {
        "normalize": ({"normalize": True}, NO_BLOCK),
        "masks": ({"query_mask": some(0.95), "target_mask": some(0.95)}, NO_BLOCK),
        "own_negatives_only": ({"own_negatives_only": some(0.1)}, NO_BLOCK),
        "ids": ({"target_ids": ids}, NO_BLOCK),
        "mask_margin": ({"mask_margin": 0.1}, NO_BLOCK),
        "hardness": ({"hardness": 9.0}, NO_BLOCK),
        "label_smoothing": ({"label_smoothing": 0.1}, NO_BLOCK),
        "weight": ({"weight": torch.rand(n, generator=generator)}, NO_BLOCK),
        "temperature gradient": ({"temperature": torch.tensor(0.02)}, NO_BLOCK),
        "temperature 0.005": ({"temperature": 0.005}, NO_BLOCK),
        "statistics": ({"return_stats": True}, NO_BLOCK),
        "symmetric": ({"symmetric": True}, SYMMETRIC),
        "query_negatives": ({"query_negatives": True}, A_BLOCK),
        "target_negatives": ({"target_negatives": True}, A_BLOCK),
        f"matryoshka {' '.join(map(str, dims))}": ({"matryoshka_dims": dims}, MATRYOSHKA),
    }
