"""LiveBytes counts what tensors of every layout hold, and lets go of it with them."""

from __future__ import annotations

import pytest
import torch

from train.plan.live_bytes import LiveBytes

INDEX, VALUE = 8, 4  # bytes of an index and of a value


def sparse(layout: torch.layout) -> tuple[torch.Tensor, int]:
    """A diagonal of 64 values, or of 32 blocks of 2 x 2, in a layout, and the bytes that it holds."""
    if layout is torch.sparse_coo:
        return torch.sparse_coo_tensor(torch.arange(64).repeat(2, 1), torch.ones(64)), 64 * (2 * INDEX + VALUE)
    count, block = (32, (2, 2)) if layout in (torch.sparse_bsr, torch.sparse_bsc) else (64, ())
    values = torch.ones(count, *block)
    made = torch.sparse_compressed_tensor(torch.arange(count + 1), torch.arange(count), values, (64, 64), layout=layout)
    return made, (2 * count + 1) * INDEX + values.nbytes


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc], ids=str)
def test_a_sparse_tensor_counts_its_indices_and_values(layout):
    tensor, size = sparse(layout)
    live = LiveBytes([tensor])
    assert live.current == size
    live.track(tensor)
    assert live.current == size
    del tensor
    assert live.current == 0


def test_sparse_gradients_of_an_embedding():
    table = torch.nn.Embedding(1000, 64, sparse=True)
    with LiveBytes(table.parameters()) as live:
        before = live.current
        table(torch.arange(10)).sum().backward()
        assert before < live.current < before + 100 * 64 * VALUE  # ten rows, not a thousand
    assert table.weight.grad.layout is torch.sparse_coo
