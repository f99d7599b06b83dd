"""fastkd: knowledge-distillation losses over huge vocabularies, fused and chunked, without
probability tensors."""

from fastkd import divergences
from fastkd.backends import buffers, eager, eager_topk  # noqa: F401 - fastkd.buffers, …
from fastkd.divergences import *  # noqa: F403 - every divergence: ForwardKL, JSD, TVD, …
from fastkd.hidden import cosine_loss, hidden_mse_loss, rkd_angle_loss, rkd_distance_loss
from fastkd.loss import KDLoss, KDParts, kd_loss
from fastkd.sources import Ensemble, LMHead, TopK

__version__ = "0.1.0"

__all__ = [
    *divergences.__all__,
    "Ensemble",
    "KDLoss",
    "KDParts",
    "LMHead",
    "TopK",
    "cosine_loss",
    "hidden_mse_loss",
    "kd_loss",
    "rkd_angle_loss",
    "rkd_distance_loss",
]
