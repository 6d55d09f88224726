"""Contrastive losses, pooling and search for embedding models: fused, exact, memory-bounded. Needs torch alone."""

from contrastive_kernels.gradcache import GradCache
from contrastive_kernels.info_nce import InfoNCELoss, InfoNCEResult, info_nce, info_nce_value_and_grad
from contrastive_kernels.options import InfoNCEOptions
from contrastive_kernels.pooled import pooled_info_nce
from contrastive_kernels.pooling import last_token_pool
from contrastive_kernels.sigmoid_loss import sigmoid_loss
from contrastive_kernels.stats import InfoNCEStats
from contrastive_kernels.topk import topk_similarity

__all__ = [
    "GradCache",
    "InfoNCELoss",
    "InfoNCEOptions",
    "InfoNCEResult",
    "InfoNCEStats",
    "info_nce",
    "info_nce_value_and_grad",
    "last_token_pool",
    "pooled_info_nce",
    "sigmoid_loss",
    "topk_similarity",
]
