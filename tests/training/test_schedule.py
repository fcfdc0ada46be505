import math

import pytest

from pynar.training import TrainingConfig, learning_rate


def rate(update, **settings):
    return learning_rate(TrainingConfig(**{"max_updates": 1000, "lr": 5e-4, **settings}), update)


def test_every_schedule_but_noam_rises_on_a_line_to_lr():
    for schedule in ("constant", "inverse_sqrt", "linear", "cosine", "exponential"):
        settings = {"schedule": schedule, "warmup_updates": 100, "warmup_init": 1e-5}
        assert rate(50, **settings) == pytest.approx(1e-5 + (5e-4 - 1e-5) / 2)
        assert rate(100, **settings) == pytest.approx(5e-4)


@pytest.mark.parametrize("update", [100, 101, 400, 999])
def test_decay_follows_the_published_formula(update):
    settings = {"warmup_updates": 100}
    share = (update - 100) / 900
    want = {
        "constant": 5e-4,
        # fairseq: decay_factor * num_updates**-0.5 with decay_factor = lr * warmup**0.5
        "inverse_sqrt": 5e-4 * 100**0.5 * update**-0.5,
        "linear": 5e-4 * (1 - share),
        "cosine": 5e-4 * 0.5 * (1 + math.cos(math.pi * share)),
        "exponential": 5e-4 * 0.999 ** (update - 100),
    }
    for schedule, value in want.items():
        got = rate(update, schedule=schedule, gamma=0.999, **settings)
        assert got == pytest.approx(value, abs=1e-18), schedule


@pytest.mark.parametrize("update", [1, 399, 400, 401, 9000])
def test_noam_is_equation_3_of_vaswani_et_al(update):
    want = 2.0 * 512**-0.5 * min(update**-0.5, update * 400**-1.5)
    got = rate(update, schedule="noam", lr=2.0, warmup_updates=400, width=512)
    assert got == pytest.approx(want)


def test_floor_holds_after_the_warm_up_only():
    settings = {"warmup_updates": 100, "warmup_init": 0.0, "min_lr": 2e-4}
    assert rate(1, **settings) < 2e-4
    assert rate(1000, **settings) == 2e-4
    assert rate(1000, schedule="noam", lr=0.01, warmup_updates=10, min_lr=3e-3) == 3e-3


def test_linear_and_cosine_end_at_the_floor():
    for schedule in ("linear", "cosine"):
        got = rate(1000, schedule=schedule, warmup_updates=10, min_lr=1e-5)
        assert got == pytest.approx(1e-5)


def test_no_warm_up_starts_at_lr():
    assert rate(1, schedule="cosine", warmup_updates=0) == pytest.approx(5e-4, rel=1e-4)
