"""Decoding strategies: typed options and one signature, `decode(model, source, lengths)`."""

from pynar.decoding.autoregressive import BeamSearch, Greedy, Sampling
from pynar.decoding.draft_and_verify import DraftAndVerify
from pynar.decoding.hypotheses import Hypotheses
from pynar.decoding.latent import ImportanceWeighted, LatentArgmax, NoisyParallel
from pynar.decoding.mask_predict import MaskPredict
from pynar.decoding.rescoring import AutoregressiveScorer, RescoringTranslator, Scorer
from pynar.decoding.translator import (
    LineTranslator,
    Strategy,
    Translation,
    Translator,
    strategy,
)

__all__ = [
    "AutoregressiveScorer",
    "BeamSearch",
    "DraftAndVerify",
    "Greedy",
    "Hypotheses",
    "ImportanceWeighted",
    "LatentArgmax",
    "LineTranslator",
    "MaskPredict",
    "NoisyParallel",
    "RescoringTranslator",
    "Sampling",
    "Scorer",
    "Strategy",
    "Translation",
    "Translator",
    "strategy",
]
