"""The GradCache package (`pip install gradcache`): its `loss_fn` swapped, the cached step stays.

python examples/gradcache_loss.py
"""

import sys

import gradcache
import torch

# the package imports itself by its name on GitHub
sys.modules.setdefault("grad_cache", gradcache)
from gradcache.grad_cache import GradCache  # noqa: E402 (after the name is set)
from gradcache.loss import SimpleContrastiveLoss  # noqa: E402 (after the name is set)

from contrastive_kernels import info_nce  # noqa: E402 (after the name is set)


def fused_loss(query, target):
    """SimpleContrastiveLoss has no temperature: its logits are dot products as they are."""
    return info_nce(query, target, temperature=1.0)


def run(loss_fn):
    torch.manual_seed(0)
    query_tower, target_tower = torch.nn.Linear(16, 8), torch.nn.Linear(16, 8)
    step = GradCache(models=[query_tower, target_tower], chunk_sizes=4, loss_fn=loss_fn)
    # two targets a query, each positive followed by its negative: `SimpleContrastiveLoss(1)` and info_nce both read it so
    loss = step(torch.randn(12, 16), torch.randn(24, 16))
    return {"loss": loss.detach(), "query": query_tower.weight.grad, "target": target_tower.weight.grad}


def before():
    return run(SimpleContrastiveLoss(n_hard_negatives=1))


def after():
    return run(fused_loss)


if __name__ == "__main__":
    one, other = before(), after()
    for name, value in other.items():
        print(f"{name:<8} largest difference {float((value - one[name]).abs().max()):.1e} of {float(value.abs().max()):.1e}")
