"""Last-token pooling with the kernels, differentiable: saves the row index and B inverse norms, no copy of the rows."""

import torch

from contrastive_kernels.triton.pool import pool_backward, pool_forward


class LastTokenPool(torch.autograd.Function):
    """(B, D) rows of hidden (B, L, D) or (T, D) at `index` (B,), divided by their L2 norm where `normalize`."""

    @staticmethod
    def forward(ctx, hidden, index, normalize, eps):
        out, inverse = pool_forward(hidden, index, normalize=normalize, eps=eps)
        ctx.save_for_backward(hidden, index, inverse)
        ctx.normalize = normalize
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, index, inverse = ctx.saved_tensors
        rows = pool_backward(grad, hidden, index, inverse, normalize=ctx.normalize)
        # the gradient of all hidden states exists only because autograd asks for it; accumulate, since an index may come twice
        whole = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        whole.view(-1, hidden.shape[-1]).index_put_((index,), rows, accumulate=True)
        return whole, None, None, None
