"""Decoding strategies: typed options and one signature, `decode(model, source, lengths)`."""

from pynar.decoding.autoregressive import BeamSearch, Greedy, Sampling
from pynar.decoding.draft_and_verify import DraftAndVerify
from pynar.decoding.hypotheses import Hypotheses
from pynar.decoding.latent import ImportanceWeighted, LatentArgmax
from pynar.decoding.mask_predict import MaskPredict
from pynar.decoding.translator import (
    LineTranslator,
    Strategy,
    Translation,
    Translator,
    strategy,
)

__all__ = [
    "BeamSearch",
    "DraftAndVerify",
    "Greedy",
    "Hypotheses",
    "ImportanceWeighted",
    "LatentArgmax",
    "LineTranslator",
    "MaskPredict",
    "Sampling",
    "Strategy",
    "Translation",
    "Translator",
    "strategy",
]
