"""Fine-tune one adapter on one group of tasks, or several groups' in lock step, through transformers' Trainer.

In: the adapted model, every group's encoded splits, a config. Out: a :class:`TrainedAdapter` each; the adapters
themselves stay in the model under their names. Every adapter starts at theta0, where the features were taken.
The checkpoint kept is the one with the best mean validation score over the group's own tasks.

The steps of all epochs are planned before the first one as a plain list (a pure function of data, config and
seed), so a killed run skips what it had done and ends with the same adapter.

Several adapters train together in one pass over the base. Each has its own steps, learning rates, clipping, optimiser
state, evaluations and best checkpoint, and gets the gradients it would get alone; so training together changes the
time, and not the adapters beyond rounding (where there is no dropout, whose random numbers fall differently).

Cost: (4 P_m + 3 attention + 6 P_a) FLOPs per token and epoch; see accounting.formulas. Memory: one base, and
activations of at most four times ``max_tokens_per_batch`` padded tokens.

:mod:`.steps` plans what is computed in a step; :mod:`.trainer` carries it out; :mod:`.tuning` is the whole of it.
"""

from __future__ import annotations

from ensemblelora.training.steps import TrainingJob, choose_layout
from ensemblelora.training.trainer import measure_validation_nll
from ensemblelora.training.tuning import TrainedAdapter, fine_tune, fine_tune_together

__all__ = [
    "TrainedAdapter",
    "TrainingJob",
    "choose_layout",
    "fine_tune",
    "fine_tune_together",
    "measure_validation_nll",
]
