"""Searches over sources against one set at a time, values against their definitions, planted noise that is found."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from ensemblelora.config import EstimationConfig
from ensemblelora.errors import DataError, UsageError
from ensemblelora.estimation import (
    Oracle,
    build_oracle,
    choose_l2_penalty,
    compute_clustered_se,
    fit_subsets,
    predict_outcomes,
    simulate_training,
)
from ensemblelora.estimation.loss import LinearRows, compute_loss_gradients
from ensemblelora.selection.prospect import Prospect
from ensemblelora.selection.search import (
    SearchSettings,
    search_backward,
    search_beam,
    search_forward,
    search_swaps,
)
from ensemblelora.selection.strategies import DEFAULT_STRATEGY, STRATEGIES, Selection, choose_strategies, select
from ensemblelora.selection.values import (
    VALUATIONS,
    choose_prefix,
    estimate_shapley,
    leave_one_out,
    score_random_sets,
)
from tests.selection_toys import RIDGE, STEPS, make_prospect, plant_features
from tests.test_steps import make_budget, make_features, train_with_torch

NOISES = (0.0, 0.5, 0.1, 1.0, 0.3)
DEFAULT = SearchSettings()
CONFIGS = {"ridge": RIDGE, "steps": STEPS}


@pytest.fixture(params=list(CONFIGS))
def prospect(request) -> Prospect:
    return make_prospect(NOISES, CONFIGS[request.param])


def slow_rows(prospect: Prospect, choice: tuple[int, ...]) -> np.ndarray:
    """The target's loss on every validation row under one set, fitted by itself."""
    (features,), oracle = prospect.oracle.replicates, prospect.oracle
    subset = prospect.subset_of(choice)
    if not subset:
        weights = np.zeros((1, features.train[0].proj_dim))
    elif oracle.config.method == "ridge":
        weights = fit_subsets(features.train, [subset], l2_penalty=oracle.l2_penalty, tolerance=1e-9).weights
    else:
        weights = simulate_training(features.train, features.validation, [subset], oracle.budget, judges=(0,))
    start, trained = predict_outcomes(features.validation[0], np.vstack([0 * weights, weights])).nll
    does_harm = oracle.config.method == "steps" and trained.mean() > start.mean()
    return start + 0.1 * (trained - start) if does_harm else trained


def slow_gain(prospect: Prospect, before: tuple[int, ...], after: tuple[int, ...]) -> tuple[float, float]:
    difference = slow_rows(prospect, before) - slow_rows(prospect, after)
    return float(difference.mean()), float(compute_clustered_se(difference, prospect.validation_groups))


def slow_climb(prospect: Prospect, start, neighbours, limit: int | None = None):
    """Every neighbour by itself, the best taken while it gains its standard error."""
    chosen, gains = start, []
    while options := neighbours(chosen):
        found = [slow_gain(prospect, chosen, option) for option in options]
        best = max(range(len(options)), key=lambda s: found[s][0])
        is_too_large = limit is not None and len(chosen) > limit
        if not is_too_large and found[best][0] < found[best][1]:
            break
        chosen, gains = options[best], [*gains, found[best][0]]
    return chosen, gains


def additions(prospect: Prospect, limit: int | None = None):
    def list_them(chosen):
        if limit is not None and len(chosen) >= limit:
            return []
        return [tuple(sorted((*chosen, j))) for j in range(prospect.n_sources) if j not in chosen]

    return list_them


def removals(chosen):
    return [tuple(i for i in chosen if i != j) for j in chosen]


@pytest.mark.parametrize(("config", "share"), [(RIDGE, 1.0), (STEPS, 0.1)])
def test_of_harm_a_tenth_counts_where_the_trainer_would_keep_its_start(config, share):
    prospect = make_prospect([0.0, 1.0, 1.0], config, includes_target=False)
    (features,), oracle = prospect.oracle.replicates, prospect.oracle
    if config is STEPS:
        oracle = Oracle((features,), 1.0, config, (), replace(oracle.budget, keeps_start=False), (0,))
        prospect = Prospect(oracle, includes_target=False)
    start, right, wrong, both = prospect.score([(), (0,), (1,), (1, 2)]).values
    outcomes = oracle.row_outcomes([(2,), (2, 3)], 0)[0]
    harm = outcomes.nll.mean(axis=1) - start
    assert start == pytest.approx(np.log(2)) and right < start and (harm > 0.02).all()
    np.testing.assert_allclose([wrong - start, both - start], share * harm, rtol=1e-6)


# Searches


def test_forward_takes_the_best_source_at_every_step(prospect):
    found = search_forward(prospect, DEFAULT)
    chosen, gains = slow_climb(prospect, (), additions(prospect))
    assert found.choice == chosen and len(chosen) >= 1, "else this test says little"
    np.testing.assert_allclose([move.gain for move in found.moves], gains, atol=1e-6)
    assert [move.n_options for move in found.moves] == list(range(5, 5 - len(chosen), -1))
    assert found.n_asked == 1 + sum(range(5, 4 - len(chosen), -1))


def test_backward_drops_the_worst_source_at_every_step(prospect):
    found = search_backward(prospect, DEFAULT)
    chosen, gains = slow_climb(prospect, (0, 1, 2, 3, 4), removals)
    assert found.choice == chosen and 3 not in chosen, "all of its labels are wrong"
    np.testing.assert_allclose([move.gain for move in found.moves], gains, atol=1e-6)
    assert all(move.added == () and len(move.dropped) == 1 for move in found.moves)


def test_swaps_end_where_no_neighbour_helps(prospect):
    found, first = search_swaps(prospect, DEFAULT), search_forward(prospect, DEFAULT)
    exchanges = [
        tuple(sorted({*kept, j})) for kept in removals(found.choice) for j in range(5) if j not in found.choice
    ]
    for neighbour in (*additions(prospect)(found.choice), *removals(found.choice), *exchanges):
        gain, error = slow_gain(prospect, found.choice, neighbour)
        assert gain < error + 1e-9
    assert slow_rows(prospect, found.choice).mean() <= slow_rows(prospect, first.choice).mean() + 1e-9
    assert found.moves[: len(first.moves)] == first.moves


def test_a_swap_mends_what_forward_can_not_take_back():
    """The best single source is not in the best pair: forward takes it, and an exchange puts it right."""
    nll = {(): 1.0, (0,): 0.7, (1,): 0.8, (2,): 0.8, (0, 1): 0.65, (0, 2): 0.65, (1, 2): 0.3, (0, 1, 2): 0.4}
    prospect = Scripted(nll, 3)
    assert search_forward(prospect, DEFAULT).choice == (0, 1, 2), "then it is too late to drop the first"
    assert search_forward(prospect, replace(DEFAULT, max_sources=2)).choice == (0, 1)
    swapped = search_swaps(prospect, replace(DEFAULT, max_sources=2))
    assert swapped.choice == (1, 2)
    assert (swapped.moves[-1].added, swapped.moves[-1].dropped) == ((2,), (0,))
    assert search_beam(prospect, replace(DEFAULT, max_sources=2)).choice == (1, 2)
    assert search_swaps(prospect, DEFAULT).choice == (1, 2)
    assert search_backward(prospect, DEFAULT).choice == (1, 2)


class Scripted(Prospect):
    """Losses by set, told in advance, the same in every row."""

    def __init__(self, nll, n_sources):
        base = make_prospect([0.0] * n_sources)
        super().__init__(base.oracle)
        object.__setattr__(self, "nll", nll)

    def solve(self, choices):
        pass

    def row_nll(self, choices):
        rows = len(self.validation_groups)
        return np.repeat(np.array([self.nll[choice] for choice in choices])[None, :, None], rows, axis=2)


def test_a_beam_of_one_is_the_search_forward(prospect):
    one, forward = (search(prospect, replace(DEFAULT, beam_width=1)) for search in (search_beam, search_forward))
    assert one.choice == forward.choice and one.n_asked == forward.n_asked
    np.testing.assert_allclose([m.gain for m in one.moves], [m.gain for m in forward.moves], atol=1e-7)


def test_a_wide_beam_finds_the_best_set_of_every_size(prospect):
    found = search_beam(prospect, replace(DEFAULT, beam_width=99))
    sets = list(itertools.combinations(range(5), len(found.choice)))
    losses = [slow_rows(prospect, chosen).mean() for chosen in sets]
    assert found.choice == sets[int(np.argmin(losses))]


@pytest.mark.parametrize("search", [search_forward, search_swaps, search_beam, search_backward])
def test_no_more_sources_than_allowed(prospect, search):
    found = search(prospect, replace(DEFAULT, max_sources=1))
    assert len(found.choice) <= 1
    if search is search_backward:
        assert len(found.moves) >= 4, "it goes on dropping whether that helps or not"


def test_a_gain_below_the_tolerance_or_its_error_moves_nothing():
    prospect = make_prospect((0.5, 0.5))
    first = search_forward(prospect, DEFAULT)
    assert first.choice == () and "predicted to gain" in first.stopped, "labels at random"
    useful = make_prospect((0.0, 0.0))
    gain = search_forward(useful, DEFAULT).moves[0].gain
    assert search_forward(useful, replace(DEFAULT, tolerance=1.01 * gain)).choice == ()
    assert search_forward(useful, replace(DEFAULT, tolerance=0.99 * gain)).choice != ()


def test_without_groups_of_rows_the_tolerance_decides():
    prospect = make_prospect((0.0, 1.0))
    (features,) = prospect.oracle.replicates
    alike = tuple(replace(block, groups=np.zeros_like(block.groups)) for block in features.validation)
    blind = Prospect(Oracle((replace(features, validation=alike),), 1.0, RIDGE, judges=(0,)))
    found = search_forward(blind, DEFAULT)
    assert found.choice == (0,) and found.moves[0].gain_se is None
    assert search_forward(blind, replace(DEFAULT, tolerance=10.0)).choice == ()


# Values


def test_leaving_one_out_is_exact(prospect):
    found = leave_one_out(prospect, DEFAULT)
    whole = (0, 1, 2, 3, 4)
    slow = [slow_gain(prospect, tuple(i for i in whole if i != j), whole) for j in whole]
    np.testing.assert_allclose(found.values, [gain for gain, _ in slow], atol=1e-6)
    np.testing.assert_allclose(found.errors, [error for _, error in slow], atol=1e-6)
    assert found.n_asked == 6


def exact_shapley(prospect: Prospect) -> np.ndarray:
    """By enumeration of all sets, weighted by how many orders put them first."""
    n = prospect.n_sources
    loss = {
        chosen: slow_rows(prospect, chosen).mean()
        for size in range(n + 1)
        for chosen in itertools.combinations(range(n), size)
    }
    values = np.zeros(n)
    for j in range(n):
        for chosen, value in loss.items():
            if j not in chosen:
                share = math.factorial(len(chosen)) * math.factorial(n - len(chosen) - 1) / math.factorial(n)
                values[j] += share * (value - loss[tuple(sorted((*chosen, j)))])
    return values


def test_shapley_values_are_exact_where_all_orders_are_taken():
    prospect = make_prospect(NOISES[:4])
    found = estimate_shapley(prospect, replace(DEFAULT, n_permutations=24))
    np.testing.assert_allclose(found.values, exact_shapley(prospect), atol=1e-6)
    assert found.n_asked == 16 and (found.errors > 0).all()


def test_shapley_values_converge_to_the_exact_ones():
    prospect = make_prospect((*NOISES, 0.7))
    exact, errors = exact_shapley(prospect), []
    for n_permutations in (4, 400):
        found = estimate_shapley(prospect, replace(DEFAULT, n_permutations=n_permutations))
        errors.append(np.abs(found.values - exact).max())
        total = slow_gain(prospect, (), prospect.everything)[0]
        assert found.values.sum() == pytest.approx(total, abs=1e-6), "whatever the orders"
    assert errors[1] < 0.01 and 3 * errors[1] < errors[0]


def test_the_error_of_few_orders_covers_what_they_miss():
    prospect = make_prospect((*NOISES, 0.7))
    exact, few = exact_shapley(prospect), replace(DEFAULT, n_permutations=16)
    found = [estimate_shapley(prospect, replace(few, seed=seed)) for seed in range(8)]
    scores = np.array([(one.values - exact) / one.errors for one in found])
    assert np.abs(scores).max() < 4


def test_scores_of_random_sets_are_means_over_the_sets_that_hold_a_source(prospect):
    found = score_random_sets(prospect, replace(DEFAULT, subset_size=2))
    sets = list(itertools.combinations(range(5), 2))
    losses = np.array([slow_rows(prospect, chosen).mean() for chosen in sets])
    own = [losses[[j in chosen for chosen in sets]].mean() for j in range(5)]
    np.testing.assert_allclose(found.values, losses.mean() - own, atol=1e-6)
    assert found.n_asked == 10
    assert found.values.sum() == pytest.approx(0, abs=1e-9), "every source is in as many sets"


def test_a_source_in_no_random_set_has_no_value_and_comes_last():
    prospect = make_prospect([0.0] * 9)
    found = score_random_sets(prospect, replace(DEFAULT, subset_size=2, n_subsets=2))
    unknown = np.isnan(found.values)
    assert 5 <= unknown.sum() <= 6 and np.isfinite(found.values[~unknown]).all()
    ranked = choose_prefix(prospect, found.values, replace(DEFAULT, max_sources=3))
    assert not unknown[list(ranked.choice)].any()


def test_a_ranking_is_cut_at_the_smallest_number_within_an_error_of_the_best(prospect):
    ranking = [1.0, 0.2, 0.9, 0.1, 0.5]
    found = choose_prefix(prospect, ranking, DEFAULT)
    order = [0, 2, 4, 1, 3]
    sets = [tuple(sorted(order[:k])) for k in range(6)]
    losses = [slow_rows(prospect, chosen).mean() for chosen in sets]
    best = int(np.argmin(losses))
    behind = [slow_gain(prospect, chosen, sets[best]) for chosen in sets[: best + 1]]
    number = next(k for k, (loss, error) in enumerate(behind) if loss <= error + 1e-12)
    assert found.choice == sets[number]
    assert [move.added for move in found.moves] == [(j,) for j in order[:number]]


# Laws


@pytest.mark.parametrize("config", list(CONFIGS.values()), ids=list(CONFIGS))
@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_wrong_labels_are_told_from_right_ones(strategy, config):
    """Half of the sources have all labels wrong: values part them without an error, and no strategy takes one."""
    noises = [0.0, 1.0] * 5
    prospect = make_prospect(noises, config)
    found = select(prospect, strategy, replace(DEFAULT, n_permutations=16))
    assert found.sources and not {j for j in found.sources if noises[j]}
    assert found.gain > 2 * found.gain_se and found.gain_over_all > 2 * found.gain_over_all_se
    if strategy in VALUATIONS:
        assert roc_auc_score([1 - noise for noise in noises], found.values) == 1.0


@pytest.mark.parametrize("mode", ["logodds", "sequence"])
def test_free_text_is_selected_alike(mode):
    prospect = make_prospect([0.0, 1.0, 0.0, 1.0], mode=mode)
    for strategy in STRATEGIES:
        found = select(prospect, strategy, DEFAULT)
        assert found.sources and set(found.sources) <= {0, 2}, strategy


@given(st.permutations(range(5)))
@settings(max_examples=4, deadline=None)
def test_the_order_of_the_sources_changes_no_choice(order):
    features = plant_features(NOISES)
    places = [0, *(1 + j for j in order)]
    shuffled = replace(
        features,
        train=tuple(features.train[i] for i in places),
        validation=tuple(features.validation[i] for i in places),
    )
    first, other = (Prospect(Oracle((one,), 1.0, RIDGE, judges=(0,))) for one in (features, shuffled))
    for search in (search_forward, search_backward, search_swaps):
        expected = search(first, DEFAULT).choice
        assert sorted(order[j] for j in search(other, DEFAULT).choice) == list(expected)
    np.testing.assert_allclose(leave_one_out(other, DEFAULT).values, leave_one_out(first, DEFAULT).values[list(order)],
                               atol=1e-6)  # fmt: skip


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_the_same_question_gives_the_same_answer(strategy):
    first, second = (asdict(select(make_prospect(NOISES, STEPS), strategy, DEFAULT)) for _ in range(2))
    first.pop("seconds"), second.pop("seconds")
    assert first == second


def test_what_json_keeps_is_what_was_found():
    found = select(make_prospect(NOISES), "shapley", DEFAULT)
    assert Selection.from_dict(asdict(found)) == found
    assert found.row_iterations > 0 and found.n_asked > 5


def test_several_projections_are_averaged_and_widen_the_errors():
    one, other = plant_features(NOISES), plant_features(NOISES)
    rng = np.random.default_rng(3)
    turned = tuple(replace(b, features=(b.features + 0.4 * rng.normal(size=b.features.shape)).astype(np.float32))
                   for b in other.train)  # fmt: skip
    both = Prospect(Oracle((one, replace(other, train=turned)), 1.0, RIDGE, judges=(0,)))
    alone = [Prospect(Oracle((part,), 1.0, RIDGE, judges=(0,))) for part in both.oracle.replicates]
    scores = [p.score([(0,), (1, 2)]) for p in (both, *alone)]
    np.testing.assert_allclose(scores[0].values, np.mean([s.values for s in scores[1:]], axis=0), atol=1e-9)
    assert (scores[0].errors > np.mean([s.errors for s in scores[1:]], axis=0) * 0.9).all()


# With the target's rows, and without


def test_the_targets_rows_are_in_every_set_or_in_none(prospect):
    without = Prospect(prospect.oracle, includes_target=False)
    assert prospect.subset_of((1, 3)) == (0, 2, 4) and without.subset_of((1, 3)) == (2, 4)
    base = slow_rows(without, ())
    np.testing.assert_allclose(without.row_nll([()])[0, 0], base)
    np.testing.assert_allclose(base, np.log(2), atol=1e-6)
    assert prospect.score([()]).values[0] < base.mean() - 0.02
    assert 0 in search_forward(without, DEFAULT).choice


# What is refused


def test_one_source_can_be_chosen_and_none_is_refused():
    alone = make_prospect([0.0])
    for strategy in STRATEGIES:
        found = select(alone, strategy, DEFAULT)
        assert found.sources in ((), (0,)) and found.gain >= 0, strategy
    assert select(alone, "forward", DEFAULT).sources == (0,)
    with pytest.raises(DataError, match="target 'target': no sources to choose from"):
        make_prospect([])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tolerance": -1.0}, "--tolerance -1.0: expected a number of nats"),
        ({"tolerance": math.nan}, "tolerance nan"),
        ({"max_sources": 0}, "--max-sources 0: expected 1 or more"),
        ({"beam_width": 0}, "--beam-width 0"),
        ({"n_permutations": 0}, "--permutations 0"),
    ],
)
def test_settings_no_search_can_follow_are_refused(changes, told):
    with pytest.raises(UsageError, match=told):
        SearchSettings(**changes)


def test_strategies_go_by_name():
    assert choose_strategies(["beam", "forward", "beam"]) == ("beam", "forward")
    whole = choose_strategies(["all"])
    assert whole[0] == DEFAULT_STRATEGY == "backward" and sorted(whole) == sorted(STRATEGIES)
    with pytest.raises(UsageError, match="unknown strategy 'greedy': expected all, or some of forward, backward"):
        choose_strategies(["greedy"])
    with pytest.raises(UsageError, match="no strategy"):
        choose_strategies([])


# What the oracle learnt for this


def test_the_epoch_kept_is_the_judges():
    features = make_features("margin", "margin", "margin", d=1)
    budget = make_budget(3, steps_per_epoch=(0.4,) * 3, learning_rate=0.3)
    path = train_with_torch(features, (1, 2), budget, budget.num_train_epochs)
    losses = [predict_outcomes(features.validation[0], w[None]).nll.mean() for w in path]
    found = simulate_training(features.train, features.validation, [(1, 2)], budget, judges=(0,))
    np.testing.assert_allclose(found[0], path[int(np.argmin(losses))], rtol=1e-5)
    own = simulate_training(features.train, features.validation, [(1, 2)], budget)
    assert not np.allclose(own, found), "else this test says nothing"


def test_the_ridge_is_the_judges():
    features, config = plant_features((1.0, 1.0), n=200), EstimationConfig(method="ridge")
    asked = [(0,), (0, 1), (0, 2), (0, 1, 2)]
    penalty, table = choose_l2_penalty(features.train, features.validation, asked, config, judges=(0,))
    for trial in table:
        fit = fit_subsets(features.train, asked, l2_penalty=trial.l2_penalty)
        assert trial.nll == pytest.approx(predict_outcomes(features.validation[0], fit.weights).nll.mean(), abs=1e-6)
    assert penalty == min(table, key=lambda trial: trial.nll).l2_penalty
    oracle = build_oracle([features], config, subsets=asked, judges=(0,))
    assert (oracle.l2_penalty, oracle.judges) == (penalty, (0,))
    assert oracle.take_replicates([0]).judges == (0,)


@pytest.mark.parametrize("mode", ["margin", "contrast", "logodds"])
def test_loss_gradients_of_rows_agree_with_finite_differences(mode):
    block = make_features(mode, d=4).train[0]
    rows, w = LinearRows.from_block(block), np.array([0.3, -0.2, 0.1, 0.4])
    found = compute_loss_gradients(rows, w)
    step = 1e-5
    for k, direction in enumerate(np.eye(4)):
        ends = predict_outcomes(block, np.stack([w + step * direction, w - step * direction])).nll
        np.testing.assert_allclose(found[:, k], (ends[0] - ends[1]) / (2 * step), atol=1e-5)


def test_rows_copied_side_by_side_give_what_rows_read_where_they_lie_give(monkeypatch):
    features = make_features("margin", "contrast", "logodds", d=5)
    asked = (features.train, features.validation, [(0,), (0, 1), (1, 2), (0, 1, 2)], make_budget(3, n_coordinates=5.0))
    copied = simulate_training(*asked)
    monkeypatch.setattr("ensemblelora.estimation.steps._JOINED_BYTES", 0)
    np.testing.assert_array_equal(simulate_training(*asked), copied)
