"""fastkd: knowledge-distillation losses over huge vocabularies, fused and chunked, without
probability tensors."""

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
from fastkd.loss import KDLoss, KDParts, kd_loss

__version__ = "0.1.0"

__all__ = [
    "JSD",
    "TAID",
    "TVD",
    "AlphaBeta",
    "Divergence",
    "ForwardKL",
    "Hellinger",
    "Jeffreys",
    "KDLoss",
    "KDParts",
    "LogitMSE",
    "Renyi",
    "ReverseKL",
    "SkewForwardKL",
    "SkewReverseKL",
    "kd_loss",
]
