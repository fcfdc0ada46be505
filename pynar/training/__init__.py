"""Training: the loop, its configuration and its schedules."""

from pynar.training.config import TrainingConfig
from pynar.training.non_finite import NonFiniteError
from pynar.training.schedule import learning_rate
from pynar.training.trainer import TrainingResult, train

__all__ = ["NonFiniteError", "TrainingConfig", "TrainingResult", "learning_rate", "train"]
