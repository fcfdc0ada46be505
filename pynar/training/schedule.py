"""Learning-rate schedules, as functions of the number of the update."""

from __future__ import annotations

import math

from pynar.training.config import TrainingConfig

__all__ = ["learning_rate"]


def learning_rate(config: TrainingConfig, update: int) -> float:
    r"""The learning rate of `update`, which counts from one.

    With :math:`u` the update, :math:`w` `warmup_updates`, :math:`p = (u-w)/(\text{max}-w)`:

    ============ ==========================================================================
    constant     :math:`lr`
    inverse_sqrt :math:`lr \sqrt{w/u}` (Ott et al. 2018)
    noam         :math:`lr \cdot width^{-1/2} \min(u^{-1/2}, u w^{-3/2})` (Vaswani et al. 2017,
                 equation 3; here `lr` is the factor in front)
    linear       :math:`lr + p\,(min\_lr - lr)`
    cosine       :math:`min\_lr + (lr - min\_lr)(1 + \cos \pi p)/2` (Loshchilov and Hutter 2017)
    exponential  :math:`lr \gamma^{u-w}` (FlowSeq, Ma et al. 2019)
    ============ ==========================================================================

    All but "noam" first rise on a line from `warmup_init` to `lr`, reached at :math:`u = w`;
    after the warm-up no rate falls below `min_lr`.
    """
    warmup = config.warmup_updates
    if config.schedule == "noam":
        rate = config.lr * config.width**-0.5 * min(update**-0.5, update * warmup**-1.5)
        return rate if update < warmup else max(rate, config.min_lr)
    if update < warmup:
        return config.warmup_init + (config.lr - config.warmup_init) * update / warmup
    return max(_decayed(config, update - warmup, warmup), config.min_lr)


def _decayed(config: TrainingConfig, since: int, warmup: int) -> float:
    done = min(since / max(config.max_updates - warmup, 1), 1.0)
    match config.schedule:
        case "inverse_sqrt":
            return config.lr * math.sqrt(warmup / (warmup + since))
        case "linear":
            return config.lr + done * (config.min_lr - config.lr)
        case "cosine":
            half = (1 + math.cos(math.pi * done)) / 2
            return config.min_lr + (config.lr - config.min_lr) * half
        case "exponential":
            return config.lr * config.gamma**since
        case _:
            return config.lr
