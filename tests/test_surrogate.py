"""The surrogate over subsets against scikit-learn left one out at a time, and against all subsets enumerated."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge
from sklearn.preprocessing import KernelCenterer

from ensemblelora import pipeline, surrogate
from ensemblelora.affinity import affinity_from_scores, sample_subsets
from ensemblelora.artifacts import load_arrays
from ensemblelora.config import AffinityConfig
from ensemblelora.surrogate import fit_row
from tests.tiny_run import TASKS, copy_run, finished_run, read_config, read_json

TASK = 2


def draw_subsets(n_tasks: int, size: int, n_subsets: int, seed: int = 0) -> np.ndarray:
    """Distinct subsets that hold TASK, as indicators."""
    everything = [s for s in itertools.combinations(range(n_tasks), size) if TASK in s]
    return indicate(np.array(everything)[np.random.default_rng(seed).permutation(len(everything))[:n_subsets]], n_tasks)


def indicate(subsets: np.ndarray, n_tasks: int) -> np.ndarray:
    members = np.zeros((len(subsets), n_tasks))
    np.put_along_axis(members, subsets, 1.0, axis=1)
    return members


def draw_scores(members: np.ndarray, seed: int = 1) -> np.ndarray:
    """Scores with main effects, interactions and noise."""
    rng = np.random.default_rng(seed)
    n = members.shape[1]
    pairs = rng.normal(size=(n, n))
    return (
        members @ rng.normal(size=n) + ((members @ pairs) * members).sum(axis=1) + 0.1 * rng.normal(size=len(members))
    )


class SlowKernel:
    """Kernel ridge regression with a Gaussian kernel; centring frees the intercept."""

    def __init__(self, alpha: float, gamma: float) -> None:
        self.gamma, self.model, self.centre = gamma, KernelRidge(alpha=alpha, kernel="precomputed"), KernelCenterer()

    def kernel(self, x: np.ndarray, z: np.ndarray) -> np.ndarray:
        return np.exp(-self.gamma * ((x[:, None] - z) ** 2).sum(axis=2))

    def fit(self, x: np.ndarray, y: np.ndarray) -> SlowKernel:
        self.x, self.level = x, y.mean()
        self.model.fit(self.centre.fit_transform(self.kernel(x, x)), y - self.level)
        return self

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self.level + self.model.predict(self.centre.transform(self.kernel(x, self.x)))


def choose_slowly(members: np.ndarray, scores: np.ndarray, kind: str) -> tuple[Ridge | SlowKernel, float]:
    """Try every ridge and width, leaving out one score after the other."""
    if kind == "linear":
        scale = np.linalg.norm(members - members.mean(axis=0), 2) ** 2
        models = [lambda r=r: Ridge(alpha=r * scale) for r in surrogate._RIDGES]
    else:
        distances = ((members[:, None] - members) ** 2).sum(axis=2)
        mean = distances.sum() / (len(members) * (len(members) - 1))
        models = []
        for width in surrogate._WIDTHS:
            centred = KernelCenterer().fit_transform(np.exp(-width / mean * distances))
            scale = np.linalg.eigvalsh(centred)[-1]
            models += [lambda r=r, w=width, s=scale: SlowKernel(r * s, w / mean) for r in surrogate._RIDGES]

    def leave_one_out(make) -> float:
        errors = []
        for left in range(len(members)):
            model = make().fit(np.delete(members, left, 0), np.delete(scores, left))
            errors.append(scores[left] - model.predict(members[[left]])[0])
        return float(np.sqrt(np.mean(np.square(errors))))

    errors = [leave_one_out(model) for model in models]
    best = next(place for place, error in enumerate(errors) if error <= min(errors) * (1 + 1e-9))  # smoothest first
    return models[best]().fit(members, scores), errors[best]


@pytest.mark.parametrize("kind", ["linear", "kernel"])
@pytest.mark.parametrize(("n_tasks", "size", "n_subsets"), [(6, 3, 8), (7, 4, 14), (5, 2, 3)])
def test_a_row_is_scikit_learns_model_averaged_over_every_subset(monkeypatch, kind, n_tasks, size, n_subsets):
    monkeypatch.setattr(surrogate, "_RIDGES", np.logspace(1, -2, 4))
    monkeypatch.setattr(surrogate, "_WIDTHS", (0.1, 1.0))
    members = draw_subsets(n_tasks, size, n_subsets)
    scores = draw_scores(members)
    model, error = choose_slowly(members, scores, kind)
    fitted = fit_row(members, scores, TASK, kind)
    assert fitted.loo_error == pytest.approx(error, rel=1e-6)
    everything = draw_subsets(n_tasks, size, 10**6)
    predicted = model.predict(everything)
    slow = [predicted[everything[:, j] > 0].mean() for j in range(n_tasks)]
    np.testing.assert_allclose(fitted.weights @ scores, slow, rtol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "kernel"])
def test_weights_are_means_and_blind_to_the_order_of_subsets(kind):
    members = draw_subsets(9, 4, 30)
    scores = draw_scores(members)
    fitted = fit_row(members, scores, TASK, kind)
    np.testing.assert_allclose(fitted.weights.sum(axis=1), 1.0)
    order = np.random.default_rng(3).permutation(30)
    again = fit_row(members[order], scores[order], TASK, kind)
    np.testing.assert_allclose(again.weights, fitted.weights[:, order], atol=1e-8)
    larger = fit_row(members, 5.0 * scores - 3.0, TASK, kind)
    np.testing.assert_allclose(larger.weights, fitted.weights, atol=1e-8)
    assert larger.loo_error == pytest.approx(5.0 * fitted.loo_error)


@pytest.mark.parametrize("kind", ["linear", "kernel"])
def test_noise_is_shrunk_to_the_tasks_mean(kind):
    members = draw_subsets(9, 4, 40)
    entries = []
    for seed in range(20):
        scores = np.random.default_rng(seed).normal(size=40)
        entries.append((fit_row(members, scores, TASK, kind).weights @ scores - scores.mean()).std())
        counts = members.sum(axis=0)
        plain = (members.T @ scores)[counts > 0] / counts[counts > 0]
        entries[-1] /= plain.std()
    assert np.median(entries) < 0.5


def test_a_kernel_of_great_width_is_the_linear_model(monkeypatch):
    members = draw_subsets(8, 4, 25)
    scores = draw_scores(members)
    monkeypatch.setattr(surrogate, "_WIDTHS", (1e-5,))
    wide, linear = (fit_row(members, scores, TASK, kind) for kind in ("kernel", "linear"))
    np.testing.assert_allclose(wide.weights @ scores, linear.weights @ scores, rtol=1e-3)
    assert wide.loo_error == pytest.approx(linear.loo_error, rel=1e-3)


@pytest.mark.parametrize("kind", ["linear", "kernel"])
def test_a_lone_subset_says_its_score_everywhere(kind):
    fitted = fit_row(draw_subsets(5, 3, 1), np.array([0.7]), TASK, kind)
    np.testing.assert_array_equal(fitted.weights, np.ones((5, 1)))
    assert np.isnan(fitted.loo_error)


def test_of_too_many_subsets_the_kernel_takes_an_evenly_spaced_part(monkeypatch):
    members = draw_subsets(9, 4, 50)
    scores = draw_scores(members)
    monkeypatch.setattr(surrogate, "_MAX_SUBSETS", 20)
    fitted = fit_row(members, scores, TASK, "kernel")
    used = np.flatnonzero(fitted.weights.any(axis=0))
    assert len(used) == 20 and {0, 49} <= set(used)
    part = fit_row(members[used], scores[used], TASK, "kernel")
    np.testing.assert_array_equal(fitted.weights[:, used], part.weights)
    assert fit_row(members, scores, TASK, "linear").weights.all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "kernel"])
def test_five_hundred_tasks_take_seconds(kind):
    """n = 500, k = 2,000, c = 10, as for 500 federated clients; about half of the pairs are in no subset."""
    design = sample_subsets(500, AffinityConfig(subset_size=10, n_subsets=2000, min_pair_count=0), seed=0)
    rng = np.random.default_rng(0)
    family = np.arange(500) % 5
    beta = np.where(family[:, None] == family, 0.1, -0.02)
    values = design.membership @ beta.T + 0.05 * rng.normal(size=(len(design.subsets), 500))
    affinity = affinity_from_scores(design, values, surrogate=kind)
    assert (affinity.counts == 0).mean() > 0.4
    off = ~np.eye(500, dtype=bool)
    same = family[:, None] == family
    own = affinity.directed - affinity.directed.mean(axis=1, keepdims=True)
    assert own[same & off].mean() - own[~same].mean() > 0.5 * own[~same].std()


def test_a_run_says_which_pairs_a_surrogate_filled_and_how_good_both_kinds_are(tmp_path):
    few = {"n_subsets": 4, "min_pair_count": 0, "surrogate": "kernel"}
    pipeline.run(read_config(copy_run(tmp_path), affinity=few), until="group")
    filled = load_arrays(tmp_path / "run" / "affinity.npz")["surrogate"]
    pairs = [f"{TASKS[i]} with {TASKS[j]}" for i, j in np.argwhere(np.triu(filled, k=1))]
    record = read_json(tmp_path, "oracle.json")["surrogate"]
    assert record["kind"] == "kernel" and record["n_pairs"] == len(pairs) > 0
    assert set(record["leave_one_out"]) == {"mean", "linear", "kernel"}
    told = read_json(tmp_path, "plan.json")["warnings"][0]
    assert told.startswith(
        f"Affinities of {len(pairs)} pairs of tasks ({', '.join(pairs)}) come from a kernel surrogate"
    )
    assert f"kernel {record['leave_one_out']['kernel']:.4f}" in told
    assert read_json(finished_run(), "oracle.json")["surrogate"] is None
