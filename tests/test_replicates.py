"""Several projections from one gradient pass: slices of a wide one, the oracle's replicates, and a run with two."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel

from ensemblelora import load_run, pipeline
from ensemblelora.artifacts import fingerprint, load_arrays
from ensemblelora.blocks import FeatureBlock, slice_projections
from ensemblelora.boosting.residual import fit_residual
from ensemblelora.config import GradientsConfig
from ensemblelora.errors import ConfigError, StoreError
from ensemblelora.estimation import Oracle, compute_clustered_se
from ensemblelora.gradients.collect import make_projector
from ensemblelora.stages.choosing import _identify_projection
from ensemblelora.stages.learning import settle_boosting
from ensemblelora.store import FeatureStore
from ensemblelora.workspace import Workspace
from tests.tiny_run import TASKS, copy_run, finished_run, read_config, read_json

SHAPE = (12, 5)
KINDS = ("rademacher", "gaussian")


def make_block(features: np.ndarray) -> FeatureBlock:
    n = len(features)
    return FeatureBlock(
        task="t",
        split="train",
        mode="margin",
        outputs=np.zeros((n, 1), np.float32),
        features=features.astype(np.float32).reshape(n, 1, -1),
        labels=np.zeros(n, np.int64),
        n_choices=np.full(n, 2),
        squared_norms=np.ones(n, np.float32),
        groups=np.arange(n),
        ids=tuple(map(str, range(n))),
    )


def project(kind: str, gradients: torch.Tensor, *, proj_dim: int, n_projections: int, seed: int) -> FeatureBlock:
    config = GradientsConfig(proj_type=kind, proj_dim=proj_dim, n_projections=n_projections)
    return make_block(make_projector(config, seed=seed).project("part", gradients).numpy())


@pytest.mark.parametrize("which", range(3))
def test_a_slice_is_a_projection_with_entries_of_its_own_width(which):
    config = GradientsConfig(proj_dim=7, n_projections=3)
    wide = make_projector(config, seed=0).matrix("part", SHAPE)
    coordinates = slice_projections(make_block(wide), 7, which).features[:, 0]
    np.testing.assert_allclose(np.abs(coordinates), 7**-0.5, rtol=1e-6)
    np.testing.assert_array_equal(np.sign(coordinates), np.sign(wide[:, 7 * which : 7 * which + 7]))


@pytest.mark.parametrize("kind", KINDS)
def test_slices_are_unbiased_and_independent(kind):
    """Inner products of two gradients, over many seeds: no slice is off on average, and their errors don't agree."""
    gradients = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    gradients[1] += gradients[0]
    truth, n_seeds, d = float((gradients[0] * gradients[1]).sum()), 1500, 6
    errors = np.empty((n_seeds, 3))
    for seed in range(n_seeds):
        block = project(kind, gradients, proj_dim=d, n_projections=3, seed=seed)
        slices = [slice_projections(block, d, which).features[:, 0] for which in range(3)]
        errors[seed] = [float(one @ other) - truth for one, other in slices]
    assert (np.abs(errors.mean(axis=0)) < 4 * errors.std(axis=0) / n_seeds**0.5).all()
    correlations = np.corrcoef(errors.T)[np.triu_indices(3, k=1)]
    assert np.abs(correlations).max() < 4 / n_seeds**0.5, "replicates share randomness: their spread is too small"
    whole = project(kind, gradients, proj_dim=d, n_projections=1, seed=0)
    assert slice_projections(whole, d) is whole, "one projection is kept bit by bit, and in its file"


def test_every_narrower_projection_can_be_taken_from_a_wide_one():
    gradients = torch.randn(40, 500, generator=torch.Generator().manual_seed(1))
    wide = project("rademacher", gradients, proj_dim=800, n_projections=1, seed=0)
    exact = (gradients @ gradients.T).numpy()
    errors = []
    for d in (50, 200, 800):
        features = slice_projections(wide, d).features[:, 0]
        errors.append(np.abs(features @ features.T - exact).mean() * d**0.5)
    assert max(errors) < 1.3 * min(errors), "the error falls as 1/sqrt(d)"


@pytest.mark.parametrize(("proj_dim", "which"), [(9, 0), (4, 2), (3, -1), (0, 0)])
def test_what_a_store_does_not_hold_is_refused(proj_dim, which):
    with pytest.raises(StoreError, match="8 columns hold no projection"):
        slice_projections(make_block(np.ones((2, 8))), proj_dim, which)


def test_one_projection_has_the_identity_it_had_before_there_could_be_several():
    several = GradientsConfig(n_projections=2)
    later = {"n_projections", "linearize_at", "warmup_epochs", "train_fraction", "validation_fraction"}
    before = {name: value for name, value in several.model_dump().items() if name not in later}
    older = type("GradientsConfig", (BaseModel,), {"__annotations__": dict.fromkeys(before, Any)})
    assert fingerprint(_identify_projection(GradientsConfig())) == fingerprint(older(**before))
    assert fingerprint(_identify_projection(several)) != fingerprint(older(**before))


def test_boosting_is_ruled_by_the_same_ridge_however_many_projections():
    rng = np.random.default_rng(0)
    features, targets = rng.normal(size=(30, 1, 4)).astype(np.float32), rng.normal(size=(30, 1))
    recipe = finished_run() / "recipe.yaml"
    one, three = (
        settle_boosting(read_config(recipe, gradients={"n_projections": n}, boosting={"l2_penalty": 0.7}))
        for n in (1, 3)
    )
    w, alpha = fit_residual(features, targets, one.l2_penalty)
    # Three times the same columns, scaled to the same length: the same gradients in a wider coordinate system.
    repeated, same = fit_residual(np.tile(features, 3) / np.float32(3**0.5), targets, three.l2_penalty)
    np.testing.assert_allclose(same, alpha, rtol=1e-5)
    np.testing.assert_allclose(repeated, np.tile(w, 3) / 3**0.5, rtol=1e-4)


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ({"proj_type": "none", "n_projections": 2}, "proj_type none would all be the same"),
        ({"proj_type": "sjlt", "n_projections": 2}, "proj_type sjlt would share the few entries"),
        ({"proj_type": "kronecker", "n_projections": 2}, "proj_type kronecker would share their factors"),
        ({"proj_dim": 2000, "n_projections": 16}, "32000 numbers, at most 20000"),
        ({"n_projections": 0}, "gradients.n_projections"),
    ],
)
def test_projections_that_cannot_serve_are_refused_before_the_model_is_loaded(gradients, message):
    with pytest.raises(ConfigError, match=message):
        pipeline.estimate(read_config(finished_run() / "recipe.yaml", gradients=gradients, model={"name": "nowhere"}))


@pytest.fixture(scope="module")
def doubled(tmp_path_factory):
    """The finished run, taken up with two projections; which stages ran."""
    folder, names = tmp_path_factory.mktemp("doubled"), []
    recipe, carry_out = copy_run(folder), Workspace._carry_out

    def spy(self, run):
        names.append(run.name)
        yield from carry_out(self, run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workspace, "_carry_out", spy)
        pipeline.run(read_config(recipe, gradients={"n_projections": 2}))
        first = list(names)
        pipeline.run(read_config(recipe, gradients={"n_projections": 2}))
    assert names == first, "nothing is done twice"
    return folder, names


def test_more_projections_cost_their_features_and_what_is_fitted_to_them(doubled):
    folder, names = doubled
    assert names[:3] == ["features", "affinity", "group"]
    if read_json(folder, "plan.json")["groups"] == read_json(finished_run(), "plan.json")["groups"]:
        assert not {"train", "baselines"} & set(names), "no adapter is trained again"
    for task, split in itertools.product(TASKS, ("train", "validation")):
        wide, narrow = (
            FeatureStore(place / "run" / "features").read(task, split) for place in (folder, finished_run())
        )
        assert wide.proj_dim == 2 * narrow.proj_dim
        np.testing.assert_array_equal(wide.outputs, narrow.outputs)
        np.testing.assert_array_equal(wide.squared_norms, narrow.squared_norms)


def test_predictions_are_averaged_over_projections_and_their_spread_widens_every_error(doubled):
    folder, _ = doubled
    oracle = load_run(folder / "run")._oracle
    assert len(oracle.replicates) == 2 and oracle.replicates[0].train[0].proj_dim == 24
    alone = [oracle.take_replicates([r]).score([(0, 1)]) for r in range(2)]
    both = oracle.score([(0, 1)])
    np.testing.assert_allclose(both.nll, np.mean([scores.nll for scores in alone], axis=0))
    spread = (alone[0].nll - alone[1].nll) ** 2 / 4  # variance of two over two
    rows = [compute_clustered_se(oracle.row_nll([(0, 1)], task), oracle.validation_groups(task)) for task in range(5)]
    np.testing.assert_allclose(both.nll_se**2, np.array(rows).T ** 2 + spread)
    asked = load_run(folder / "run").ask(TASKS[:2])
    assert [asked[name]["nll_se"] for name in TASKS] == pytest.approx(both.nll_se[0].tolist())


def test_the_plan_is_that_of_both_projections(doubled):
    folder, _ = doubled
    plan = read_json(folder, "plan.json")
    oracle = load_run(folder / "run")._oracle
    assert isinstance(oracle, Oracle)
    base = oracle.score([()])
    assert plan["predicted"]["base"]["nll"] == pytest.approx(base.nll[0].tolist(), rel=1e-6)
    assert all(se > 0 for se in plan["predicted"]["plan"]["nll_se"])
    matrix = load_arrays(folder / "run" / "affinity.npz")["directed"]
    assert not np.allclose(matrix, load_arrays(finished_run() / "run" / "affinity.npz")["directed"])


def test_the_forecast_counts_every_projection(doubled):
    recipe = finished_run() / "recipe.yaml"
    one, two = (pipeline.estimate(read_config(recipe, gradients={"n_projections": n}))["features"] for n in (1, 2))
    assert two["disk_bytes"] == pytest.approx(one["disk_bytes"] * 49 / 25)  # d features and an output each
    assert two["flops"] > one["flops"] and two["n_tokens"] == one["n_tokens"]
    folder, _ = doubled
    spent = [record for record in read_json(folder, "costs.json")["stages"] if record["stage"] == "features"]
    assert spent[0]["flops"] == two["flops"]
