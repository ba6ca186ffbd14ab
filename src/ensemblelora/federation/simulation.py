"""Groups of clients trained in advance, on the linear model: the rounds that federated averaging will take. No torch.

In: what stands for clients' rows, the config. Out: :class:`Simulation`, fitted weights of any group. Rounds, who takes
part, steps, rate and schedule are those of the training (:mod:`.rounds`, :mod:`.local`). What the linear model can't
follow: what A does, the cut to rank r, clients that fail, noise on updates. A has no gradient at theta0, and each round
begins with A at its first length and an optimiser of no past; so no longer way stands for it here, as it does where one
optimiser takes all steps (docs/decisions/0011).

The rate may fall from round to round, and then whoever happens to come first counts most. So each group is simulated
twice, its rounds in the order in which they were dealt and backwards, and the mean of both is taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ensemblelora.config_federation import FederatedTrainingConfig, FederationConfig
from ensemblelora.data.batching import plan_batches
from ensemblelora.estimation import AbstractClients, TrainingBudget, simulate_averaging
from ensemblelora.estimation.steps import count_steps
from ensemblelora.federation.dealing import deal_clients
from ensemblelora.federation.exchange import Registered
from ensemblelora.seeding import seed_for

__all__ = ["Simulation", "plan_local_budget"]

FloatArray = npt.NDArray[np.float64]
Subset = tuple[int, ...]


def plan_local_budget(clients: Sequence[Registered], config: FederationConfig, *, n_coordinates: int) -> TrainingBudget:
    """Say what each client does in a round.

    Args:
        clients: Who takes part.
        config: The federation's.
        n_coordinates: Numbers of an adapter that have a gradient at theta0.
    """
    training = config.training
    return TrainingBudget(
        learning_rate=training.learning_rate,
        num_train_epochs=training.local_passes,
        evaluations_per_epoch=1,
        warmup_ratio=0.0,
        lr_scheduler_type=training.lr_scheduler_type,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        steps_per_epoch=tuple(_count_steps(client, training) for client in clients),
        n_coordinates=n_coordinates,
        seed=seed_for(config.seed, "simulated training"),
    )


class Simulation:
    """Answers what any group of clients would be trained to; a group is simulated once."""

    def __init__(self, clients: AbstractClients, config: FederationConfig, budget: TrainingBudget) -> None:
        """Take clients and what they do in a round."""
        self._clients, self._config, self._budget = clients, config, budget
        self._known: dict[Subset, FloatArray] = {}

    def fit(self, groups: Sequence[Subset]) -> FloatArray:
        """Return the weights after the last round of each group, ``(k, d)``."""
        settings, seed = self._config.training, self._config.seed
        missing = [group for group in dict.fromkeys(groups) if group not in self._known]
        if missing:
            rounds = [
                deal_clients(
                    [group],
                    participation=settings.participation,
                    n_epochs=settings.num_train_epochs,
                    seed=seed,
                    name=f"simulated {group}",
                )[0]
                for group in missing
            ]
            ways = (rounds, [own[::-1] for own in rounds])
            found = np.mean([simulate_averaging(self._clients, way, self._budget) for way in ways], axis=0)
            self._known |= zip(missing, found, strict=True)
        return np.array([self._known[group] for group in groups]).reshape(len(groups), self._clients.proj_dim)

    @property
    def fitted(self) -> tuple[Subset, ...]:
        """Groups that were simulated."""
        return tuple(self._known)

    @property
    def n_passes(self) -> int:
        """Passes over each client's rows in the simulation of one group."""
        return 2 * self._config.training.num_train_epochs * self._budget.num_train_epochs

    def count_steps(self, group: Subset) -> int:
        """Count the steps of all clients in the simulation of one group."""
        return self.n_passes * sum(count_steps((client,), self._budget) for client in group)


def _count_steps(client: Registered, training: FederatedTrainingConfig) -> int:
    """Steps of one pass: the client's rows are of nearly equal length."""
    n = client.n_rows["train"]
    lengths = np.full(n, -(-client.n_tokens["train"] // n), np.int64)
    counts = np.ones(n, np.int64)
    return len(
        plan_batches(lengths, counts, training.max_tokens_per_batch, max_examples=training.max_examples_per_batch)
    )
