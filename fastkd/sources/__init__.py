"""Where logits come from, and what becomes of their gradient: a file each, and source.py what they
have in common."""

from fastkd.sources.dense import Dense, as_source
from fastkd.sources.ensemble import Ensemble
from fastkd.sources.lm_head import LMHead
from fastkd.sources.source import Reader, Source
from fastkd.sources.topk import TopK

__all__ = [
    "Dense",
    "Ensemble",
    "LMHead",
    "Reader",
    "Source",
    "TopK",
    "as_source",
]
