"""Knowledge distillation for non-autoregressive students (Zhou et al. 2020)."""

from pynar.distill.corpus import distill

__all__ = ["distill"]
