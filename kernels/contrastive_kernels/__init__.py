"""Contrastive losses, pooling and search for embedding models: fused, exact, memory-bounded. Needs torch alone."""

from .distillation_loss import distillation_loss
from .gradcache.grad_cache import GradCache
from .info_nce import InfoNCELoss, InfoNCEResult, info_nce, info_nce_value_and_grad
from .options import InfoNCEOptions
from .pooling import last_token_pool
from .pooling.loss import pooled_info_nce
from .sigmoid_loss import sigmoid_loss
from .stats import InfoNCEStats
from .topk import topk_similarity

__all__ = [
    "GradCache",
    "InfoNCELoss",
    "InfoNCEOptions",
    "InfoNCEResult",
    "InfoNCEStats",
    "distillation_loss",
    "info_nce",
    "info_nce_value_and_grad",
    "last_token_pool",
    "pooled_info_nce",
    "sigmoid_loss",
    "topk_similarity",
]
