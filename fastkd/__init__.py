"""fastkd: knowledge-distillation losses over huge vocabularies, fused and chunked, without
probability tensors."""

from fastkd.backends import buffers, eager, eager_topk  # noqa: F401 - fastkd.buffers, …
from fastkd.divergences import (
    JSD,
    TAID,
    TVD,
    AlphaBeta,
    Divergence,
    ForwardKL,
    Hellinger,
    Jeffreys,
    LogitMSE,
    Renyi,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
)
from fastkd.hidden import cosine_loss, hidden_mse_loss, rkd_angle_loss, rkd_distance_loss
from fastkd.loss import KDLoss, KDParts, kd_loss
from fastkd.sources import Ensemble, LMHead, TopK

__version__ = "0.1.0"

__all__ = [
    "JSD",
    "TAID",
    "TVD",
    "AlphaBeta",
    "Divergence",
    "Ensemble",
    "ForwardKL",
    "Hellinger",
    "Jeffreys",
    "KDLoss",
    "KDParts",
    "LMHead",
    "LogitMSE",
    "Renyi",
    "ReverseKL",
    "SkewForwardKL",
    "SkewReverseKL",
    "TopK",
    "cosine_loss",
    "hidden_mse_loss",
    "kd_loss",
    "rkd_angle_loss",
    "rkd_distance_loss",
]
