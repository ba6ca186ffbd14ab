"""The config of a federation: clients whose texts stay with them, one adapter for each group of clients.

Sections that a run has too (model, adapter) are the same; the others are here, with the only place of their defaults.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from ensemblelora.config import MAX_PROJ_DIM, AdapterConfig, ModelConfig
from ensemblelora.config_stage import Stage

__all__ = [
    "BASELINES",
    "ClientsConfig",
    "EngineConfig",
    "FederatedBoostingConfig",
    "FederatedEvaluationConfig",
    "FederatedFeaturesConfig",
    "FederatedGroupsConfig",
    "FederatedTrainingConfig",
    "FederationConfig",
    "PrivacyConfig",
]

Baseline = Literal["base", "global", "random", "mtl-ft", "local"]
BASELINES: tuple[Baseline, ...] = ("base", "global", "random", "mtl-ft", "local")

_Counts = Annotated[tuple[PositiveInt, ...], Field(min_length=1, title="a list of whole numbers from 1 on")]


class ClientsConfig(Stage):
    """Whose texts, and how they become rows of tokens."""

    source: str = Field(description="A folder; ${NAME} in it is an environment variable.")
    kind: Literal["files", "roles"] = Field(
        "files",
        description="files: a .txt, .jsonl or .csv file is a client; roles: each speaking role of a play is one, the "
        "play a .txt file of SPEAKER<TAB>line.",
    )
    text_column: str = Field("text", description="Of .jsonl and .csv files.")
    min_lines: int = Field(10, ge=1, description="Clients with fewer lines are left out.")
    max_clients: int | None = Field(None, ge=1, description="So many of the others, drawn by seed; none: all.")
    test_fraction: float = Field(0.2, gt=0, lt=1, description="Each client's last lines. Paper: 0.2.")
    validation_fraction: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="Of the lines before those, the last: groups, boosting and weights are chosen by them.",
    )
    max_length: int = Field(64, ge=4, description="Tokens of a row: a client's text is cut into rows of equal length.")
    max_train_rows: int | None = Field(None, ge=1, description="Rows kept of each client, drawn by seed; none: all.")
    max_validation_rows: int | None = Field(None, ge=1, description="The same of validation rows.")
    max_test_rows: int | None = Field(None, ge=1, description="The same of test rows.")


class FederatedFeaturesConfig(Stage):
    """What clients send of their gradients at the base model, once; each side makes the projection from the seed."""

    send: Literal["rows", "moments"] = Field(
        "rows",
        description="rows: each row's projected gradient; moments: their sums, as the quadratic model of a client's "
        "loss needs them, (d + 1)(d + 2) / 2 numbers a split whatever the number of rows.",
    )
    proj_type: Literal["rademacher", "gaussian", "sjlt", "kronecker"] = Field(
        "rademacher", description="As gradients.proj_type of a run."
    )
    proj_dim: int = Field(400, ge=1, le=MAX_PROJ_DIM, description="d. Paper: 400; with moments rather 100.")
    max_tokens_per_batch: int = Field(2048, ge=1, description="Padded tokens of one gradient pass; bounds its memory.")


class PrivacyConfig(Stage):
    """Noise on what clients send; epsilon of (epsilon, delta)-differential privacy is stated for one row replaced."""

    clip_norm: float | None = Field(
        None, gt=0, description="Norm to which each row's share of the features is cut; none: not at all."
    )
    noise_multiplier: float = Field(
        0.0, ge=0, description="Standard deviation of the noise on features, over twice clip_norm."
    )
    update_clip_norm: float | None = Field(
        None, gt=0, description="Norm to which a round's change of the adapter is cut; none: not at all."
    )
    update_noise_multiplier: float = Field(
        0.0, ge=0, description="Standard deviation of the noise on that change, over twice update_clip_norm."
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="Of the guarantee.")

    @model_validator(mode="after")
    def _check_together(self) -> PrivacyConfig:
        for clip, noise in (("clip_norm", "noise_multiplier"), ("update_clip_norm", "update_noise_multiplier")):
            if getattr(self, noise) and getattr(self, clip) is None:
                raise ValueError(f"{noise} {getattr(self, noise)}: noise is measured in units of {clip}; set that, too")
        return self


class FederatedGroupsConfig(Stage):
    """Which clients train together."""

    n_groups: _Counts = Field(
        (10,), description="Numbers of groups; each is carried out, the best by validation serves. Paper: 10 to 30."
    )
    subset_size: int = Field(10, ge=2, description="Clients of a subset that the oracle is asked about. Paper: 10.")
    n_subsets: int = Field(2000, ge=1, description="Paper: 2,000.")
    surrogate: Literal["linear", "kernel"] = Field(
        "linear", description="What fills pairs of clients that no subset holds, and smooths those of many clients."
    )
    method: Literal["steps", "ridge"] = Field(
        "steps", description="steps: the rounds that training takes, on the linear model; ridge: the convex fit, paper."
    )
    l2_penalty: Literal["auto"] | NonNegativeFloat = Field(
        "auto", description="Of method ridge, in curvature units, scaled with 1/N_S; auto: by validation."
    )
    l2_grid: tuple[float, ...] = Field((1e-2, 1e-1, 1.0, 1e1, 1e2), description="What auto tries.")
    n_restarts: int = Field(20, ge=1, description="Starts of k-means and random starts.")

    @model_validator(mode="after")
    def _check_penalty(self) -> FederatedGroupsConfig:
        if self.method == "steps" and self.l2_penalty != "auto":
            raise ValueError(f"l2_penalty {self.l2_penalty}: method steps has none; set groups.method: ridge")
        return self


class FederatedTrainingConfig(Stage):
    """Federated averaging, inside each group and for all clients together."""

    learning_rate: float = Field(2e-3, gt=0, description="Of the clients' AdamW, which begins anew in each round.")
    num_train_epochs: int = Field(2, ge=1, description="How often each client takes part in a training.")
    participation: float = Field(0.1, gt=0, le=1, description="Share of a group's clients that take part in a round.")
    local_passes: int = Field(1, ge=1, description="Passes over its rows that a client makes in a round.")
    max_examples_per_batch: int = Field(4, ge=1, description="Rows in one optimiser step.")
    max_tokens_per_batch: int = Field(2048, ge=1, description="Padded tokens in one optimiser step.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's.")
    max_grad_norm: float = Field(1.0, gt=0, description="Longer gradients are cut to this norm.")
    lr_scheduler_type: Literal["linear", "constant"] = Field("linear", description="Over the rounds, to zero.")
    aggregation: Literal["exact", "factors"] = Field(
        "exact", description="exact: the mean of the clients' B A, cut to rank r; factors: means of B and of A."
    )
    min_reply_share: float = Field(
        0.5, gt=0, le=1, description="Of those asked; with fewer replies a round changes nothing."
    )
    reply_seconds: float = Field(3600.0, gt=0, description="Who has not replied by then is left out of the round.")


class FederatedBoostingConfig(Stage):
    """Adapters added where a group still errs, trained by federated averaging on what the group's own leaves."""

    n_rounds: Annotated[tuple[int, ...], Field(title="a list of whole numbers")] = Field(
        (), description="Numbers of boosters, for each number of groups; empty: none. Paper: 1 to 10."
    )
    boosting_rate: float = Field(
        1.0, gt=0, le=1, description="What a booster's change of the outputs is multiplied with."
    )
    num_train_epochs: int = Field(1, ge=1, description="How often each client of the group takes part.")

    @model_validator(mode="after")
    def _check_counts(self) -> FederatedBoostingConfig:
        if any(n < 1 for n in self.n_rounds):
            raise ValueError(
                f"n_rounds {list(self.n_rounds)}: expected numbers from 1 on; without boosting, an empty list"
            )
        return self


class FederatedEvaluationConfig(Stage):
    """What ours is compared with, on each client's own test rows."""

    baselines: tuple[Baseline, ...] = Field(
        BASELINES,
        description="base: the model as it is; global: one adapter for all clients; random: groups drawn at random; "
        "mtl-ft: the global one, fine-tuned by each client; local: each client alone.",
    )
    random_groups: int | None = Field(
        None,
        ge=1,
        description="Number of groups whose sizes the random ones have, one of groups.n_groups; none: the first.",
    )
    n_candidates: int = Field(
        3,
        ge=1,
        description="Members that a client weighs: its group, the global adapter, the next best groups; 1: none.",
    )
    n_bootstrap: int = Field(2000, ge=100, description="Draws of clients for each interval.")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="Of the intervals.")


class EngineConfig(Stage):
    """Where server and clients run."""

    kind: Literal["simulation", "process", "deployment"] = Field(
        "simulation",
        description="simulation: Flower's engine on this machine; process: this process alone, without Flower; "
        "deployment: SuperNodes that are connected to a SuperLink.",
    )
    num_cpus: int | None = Field(
        None, ge=1, description="Of simulation: cores of each client at work; none: all, one client at a time."
    )
    num_gpus: float = Field(0.0, ge=0, description="Of simulation: accelerators of each client at work.")
    superlink: str = Field("127.0.0.1:8000", description="Of deployment: address of the SuperLink.")
    root_certificates: str | None = Field(
        None, description="Of deployment: file of the certificate that proves the SuperLink; none: no encryption."
    )
    min_clients: int = Field(2, ge=1, description="Of deployment: SuperNodes to wait for.")
    wait_seconds: float = Field(300.0, gt=0, description="Of deployment: how long to wait for them.")


class FederationConfig(Stage):
    """Everything one federation needs."""

    out: str = Field("runs/federation", description="The run folder.")
    seed: int = Field(0, ge=0, description="Root of all randomness, on all sides.")
    clients: ClientsConfig
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    features: FederatedFeaturesConfig = FederatedFeaturesConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    groups: FederatedGroupsConfig = FederatedGroupsConfig()
    training: FederatedTrainingConfig = FederatedTrainingConfig()
    boosting: FederatedBoostingConfig = FederatedBoostingConfig()
    evaluation: FederatedEvaluationConfig = FederatedEvaluationConfig()
    engine: EngineConfig = EngineConfig()

    @model_validator(mode="after")
    def _check_together(self) -> FederationConfig:
        if self.training.aggregation == "exact" and self.adapter.method != "lora":
            raise ValueError(
                f"training.aggregation exact: products B A are LoRA's, and adapter.method is {self.adapter.method}; "
                "use factors"
            )
        random, known = self.evaluation.random_groups, self.groups.n_groups
        if random is not None and random not in known:
            raise ValueError(f"evaluation.random_groups {random}: expected one of groups.n_groups, {list(known)}")
        if "mtl-ft" in self.evaluation.baselines and "global" not in self.evaluation.baselines:
            raise ValueError("evaluation.baselines: mtl-ft begins at the global adapter; name global, too")
        return self
