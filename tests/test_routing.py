"""Rows without a task's name: which task they are taken for, how surely, and which weights answer them."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy.special import softmax

from ensemblelora import artifacts
from ensemblelora.answers import Question
from ensemblelora.api import Run, load_run
from ensemblelora.cli import main
from ensemblelora.data.catalog import find_cards, load_card
from ensemblelora.data.loading import load_task, render_inputs
from ensemblelora.data.rendering import strip_words
from ensemblelora.embedding import embed_texts
from ensemblelora.errors import DataError, UsageError
from ensemblelora.progress import announcing
from ensemblelora.routing import (
    Router,
    choose_route,
    describe_format,
    fit_router,
    open_router,
    read_texts,
    score_tasks,
    weigh_tasks,
)
from tests.tiny_run import TASKS, copy_run, finished_run
from tests.toys import make_card

N_TASKS, WIDTH = 3, 6


@cache
def loaded() -> Run:
    """The finished run, its model loaded once."""
    return load_run(finished_run() / "run")


def read_rows(task: str) -> list[dict[str, str]]:
    lines = (finished_run() / "tasks" / f"{task}.test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def draw(n: int, *, seed: int, distance: float = 2.0, tasks: int = N_TASKS) -> list[np.ndarray]:
    """Rows of each task about its own mean, numbers of very different sizes, tied to each other."""
    fixed = np.random.default_rng(0)
    means = distance * fixed.standard_normal((tasks, WIDTH))
    mix = (np.eye(WIDTH) + 0.2 * fixed.standard_normal((WIDTH, WIDTH))) * np.logspace(0, 3, WIDTH)
    rng = np.random.default_rng(seed)
    return [(mean + rng.standard_normal((n, WIDTH))) @ mix for mean in means]


def fit(train: list[np.ndarray], validation: list[np.ndarray], formats: str = "abc") -> Router:
    return fit_router(train, validation, task_names=[f"t{i}" for i in range(len(train))], formats=formats)


def probabilities(router: Router, rows: np.ndarray) -> np.ndarray:
    return weigh_tasks(router, score_tasks(router, rows))


def test_scores_are_distances_to_the_tasks_means_in_the_covariance_that_they_share():
    train, rows = draw(2000, seed=2, distance=0.7), np.concatenate(draw(5, seed=3, distance=0.7))
    router = fit(train, draw(50, seed=4, distance=0.7))
    scaled = [(found - router.center) / router.scale for found in train]
    means = np.array([found.mean(axis=0) for found in scaled])
    within = np.concatenate([found - mean for found, mean in zip(scaled, means, strict=True)])
    inverse = np.linalg.inv(np.cov(within.T, bias=True))
    for row, found in zip(rows, probabilities(router, rows), strict=True):
        distances = [
            ((row - router.center) / router.scale - m) @ inverse @ ((row - router.center) / router.scale - m)
            for m in means
        ]
        expected = softmax(-0.5 * np.array(distances) / router.temperature)
        np.testing.assert_allclose(found, expected, atol=0.02)  # Ledoit and Wolf shrink a little


def test_probabilities_are_calibrated_on_rows_that_nothing_was_fitted_to():
    router = fit(draw(40, seed=2, distance=0.6), draw(200, seed=3, distance=0.6))
    fresh = draw(2000, seed=4, distance=0.6)
    found = probabilities(router, np.concatenate(fresh))
    labels = np.repeat(np.arange(N_TASKS), 2000)
    sure = found.max(axis=1)
    right = found.argmax(axis=1) == labels
    assert 0.5 < right.mean() < 0.95, "neither clear nor hopeless, or the test tells nothing"
    for low, high in ((0.4, 0.6), (0.6, 0.8), (0.8, 1.0)):
        inside = (sure >= low) & (sure < high)
        assert inside.sum() > 100
        assert right[inside].mean() == pytest.approx(sure[inside].mean(), abs=0.06)


def test_more_numbers_than_rows_are_no_reason_to_be_sure():
    rng = np.random.default_rng(5)
    noise = [[rng.standard_normal((n, 60)) for _ in range(2)] for n in (20, 40, 500)]
    router = fit(noise[0], noise[1], "aa")
    found = probabilities(router, np.concatenate(noise[2]))
    assert -np.log(np.concatenate([found[:500, 0], found[500:, 1]])).mean() < np.log(2) + 0.05


def test_neither_the_order_of_tasks_nor_the_units_of_numbers_matter():
    train, validation, rows = draw(60, seed=2), draw(30, seed=3), np.concatenate(draw(4, seed=4))
    plain = probabilities(fit(train, validation), rows)
    turned = probabilities(fit(train[::-1], validation[::-1]), rows)[:, ::-1]
    np.testing.assert_allclose(turned, plain, atol=1e-6)
    units = np.logspace(-4, 4, WIDTH)
    other = probabilities(fit([t * units for t in train], [v * units for v in validation]), rows * units)
    np.testing.assert_allclose(other, plain, atol=1e-4)


def test_a_number_that_never_varies_within_a_task_does_not_break_the_fit():
    train, validation = draw(60, seed=2), draw(30, seed=3)
    for rows in (*train, *validation):
        rows[:, 0] = 7.0
    found = probabilities(fit(train, validation), np.concatenate(validation))
    assert np.isfinite(found).all()
    assert (found.argmax(axis=1) == np.repeat(np.arange(N_TASKS), 30)).mean() > 0.8


def test_few_rows_prove_no_certainty():
    router = fit(draw(60, seed=2, distance=9.0), draw(3, seed=3, distance=9.0))
    found = probabilities(router, np.concatenate(draw(50, seed=4, distance=9.0)))
    assert found.max() <= 1 - 2 / 3 * (1 / 10) + 1e-9, "nine rows, of which none was taken for another task's"
    np.testing.assert_allclose(found.sum(axis=1), 1.0)


def test_one_task_is_always_the_one():
    router = fit(draw(20, seed=2, tasks=1), draw(10, seed=3, tasks=1), "a")
    np.testing.assert_allclose(probabilities(router, draw(5, seed=4, tasks=1)[0]), 1.0)


WEIGHTS = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])


def make_router(formats: str) -> Router:
    nothing = np.zeros(1)
    return Router(("x", "y", "z"), tuple(formats), nothing, nothing, np.zeros((3, 1)), np.zeros(3), 1.0, 0.0)


def test_weights_are_the_mean_of_the_comparable_tasks_by_their_probabilities():
    shares = np.array([0.2, 0.5, 0.3])
    route = choose_route(make_router("aaa"), np.log(shares), WEIGHTS)
    assert route.task == 1 and list(route.probabilities) == ["y", "z", "x"]
    np.testing.assert_allclose(list(route.probabilities.values()), [0.5, 0.3, 0.2])
    np.testing.assert_allclose(route.weights, shares @ WEIGHTS)


def test_the_likeliest_format_wins_and_others_have_no_say():
    route = choose_route(make_router("aba"), np.log([0.3, 0.4, 0.3]), WEIGHTS)
    assert route.task in (0, 2), "together the tasks of format a are likelier than the one of b"
    np.testing.assert_allclose(route.weights, 0.5 * WEIGHTS[0] + 0.5 * WEIGHTS[2])
    np.testing.assert_allclose(sum(route.probabilities.values()), 1.0)


def test_a_task_that_cannot_be_asked_has_no_probability_and_a_negligible_one_no_weight():
    route = choose_route(make_router("aaa"), np.array([np.log(0.995), np.log(0.005), -np.inf]), WEIGHTS)
    assert list(route.probabilities) == ["x", "y"]
    np.testing.assert_allclose(route.weights, WEIGHTS[0])


def test_one_format_is_one_kind_of_scoring_and_one_set_of_labels():
    first, other = make_card(doc_to_choice=["no", "yes"]), make_card(doc_to_choice={"a": "yes ", "b": "no"})
    assert describe_format(first, "verbalizer") == describe_format(other, "verbalizer")
    assert describe_format(first, "options") != describe_format(other, "verbalizer")
    assert describe_format(make_card(doc_to_choice=["no", "yes", "perhaps"]), "options") != describe_format(
        first, "options"
    )
    assert describe_format(make_card(doc_to_choice="{{options}}"), "options") == "options: {{options}}"
    assert describe_format(make_card(doc_to_choice=None, output_type="generate_until"), "sequence") == "sequence"


@pytest.mark.parametrize(
    ("template", "left"),
    [
        ("text", "text"),
        ("Words: {{text}}\nAnswer:", "\n{{text}}\n"),
        ("{{a}} and {{ b|trim }}", "{{a}}\n{{ b|trim }}"),
        ("{% if a %}Title: {{a}}{% endif %}{# no #}{{b}}", "{% if a %}\n{{a}}{% endif %}{# no #}{{b}}"),
        ("Say {{ '{' }} {{b}}", "\n{{ '{' }}\n{{b}}"),
    ],
)
def test_a_cards_own_words_are_left_out(template, left):
    bare = strip_words(make_card(doc_to_text=template, description="Read this."))
    assert (bare.doc_to_text, bare.description) == (left, "")
    row = {"text": "T", "a": "A", "b": "B", "label": 0}
    context = render_inputs(bare, [row])[0].context
    assert not {"Words", "Answer", "Title", "Say", "and"} & set(context.split())


@pytest.mark.parametrize("name", sorted(find_cards()))
def test_every_shipped_card_is_left_with_what_its_rows_bring(name):
    card = load_card(find_cards()[name])
    assert "{" in strip_words(card).doc_to_text or strip_words(card).doc_to_text == card.doc_to_text


def test_a_row_is_read_as_each_card_that_can_read_it():
    one = make_card(task="one", doc_to_text="Q: {{text}}")
    two = make_card(task="two", doc_to_text="{{text}} / {{more}}")
    own = make_card(task="own", doc_to_text="{{text}}", doc_to_choice="{{options}}")
    exploded = make_card(task="many", doc_to_text="{{qs.q}}", explode="qs")
    cards = [one, two, own, exploded]
    rows = ["a text", {"text": " a text\n"}, {"text": "t", "more": "m"}, {"qs": [{"q": "first"}, {"q": "second"}]}]
    assert read_texts(cards, rows) == [
        ["a text", None, None, None],
        ["a text", None, None, None],
        ["t", "t\nm", None, None],
        [None, None, None, "first\nsecond"],
    ]
    assert read_texts(cards, [{"text": "t", "options": ["a", "b"]}, {"text": "u", "options": "none"}]) == [
        ["t", None, "t", None],
        ["u", None, None, None],
    ]
    assert read_texts(cards, []) == []


def test_the_rows_that_fit_the_router_are_the_runs_own_and_no_test_rows():
    run = loaded()
    for card in run.cards.values():
        own = load_task(card, run.config.data, seed=run.config.seed)
        bare = load_task(strip_words(card), run.config.data, seed=run.config.seed)
        for split in ("train", "validation", "test"):
            assert [e.id for e in bare.splits[split]] == [e.id for e in own.splits[split]]
    record = artifacts.read_json(open_kept(run))
    assert record["n_rows"] == {"train": [16] * len(TASKS), "validation": [12] * len(TASKS)}


def open_kept(run: Run) -> Path:
    run.load(with_router=True)
    return run.path / "routing.json"


def test_a_text_is_embedded_alike_alone_and_among_others_and_by_the_base_model():
    adapted, ensemble = loaded()._model
    texts = ["fire and ice", "a much longer text of several words that stands beside it", ""]
    options = {"max_length": 64, "max_tokens": 512}
    together = embed_texts(adapted, texts, **options)
    alone = np.concatenate([embed_texts(adapted, [text], **options) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    tokens = adapted.base.tokenizer(texts[0], return_tensors="pt", add_special_tokens=False)["input_ids"]
    with adapted.peft.disable_adapter():
        states = adapted.network.base_model(input_ids=tokens).last_hidden_state
    np.testing.assert_allclose(together[0], states[0].mean(dim=0).detach().numpy(), atol=1e-5)
    assert embed_texts(adapted, [], **options).shape == (0, 32) and ensemble.members


def test_tasks_with_the_same_texts_are_not_told_apart_and_those_of_other_texts_are():
    rows = [row["text"] for row in read_rows(TASKS[0])]
    found = loaded().predict(None, rows)
    twins = [answer.routing[TASKS[0]] + answer.routing[TASKS[1]] for answer in found]
    assert all(sum(answer.routing.values()) == pytest.approx(1.0) for answer in found)
    # The planted tasks draw from the same words; whatever is said, nobody may be sure.
    assert max(max(answer.routing.values()) for answer in found) < 0.9
    assert all(0 <= share <= 1 for share in twins)


def test_a_routed_answer_is_that_of_the_task_under_the_routed_weights():
    run, row = loaded(), read_rows(TASKS[0])[0]["text"]
    answer = run.predict(None, [row])[0]
    _, ensemble = run._model
    formats = [describe_format(run.cards[name], run.kinds[name]) for name in TASKS]
    inside = np.array(
        [answer.routing[name] if formats[i] == formats[TASKS.index(answer.task)] else 0 for i, name in enumerate(TASKS)]
    )
    inside[inside < 0.01 * inside.sum()] = 0
    weights = inside @ np.array(ensemble.weights) / inside.sum()
    names = [ensemble.members_of(g)[0].name for g in range(len(ensemble.groups))]
    used = {name: weight for name, weight in zip(names, weights.tolist(), strict=True) if weight > 0}
    assert answer.groups == pytest.approx(used)
    by_hand = run.predict_all([Question(answer.task, [row])])
    assert by_hand[0][0].task == answer.task and by_hand[0][0].routing is None
    if answer.probabilities is not None:
        assert set(by_hand[0][0].probabilities) == set(answer.probabilities)


def test_members_are_named_with_their_shares():
    answer = loaded().predict(TASKS[0], [read_rows(TASKS[0])[0]["text"]])[0]
    _, ensemble = loaded()._model
    weights = ensemble.weights[0]
    assert answer.members == {m.name: weights[m.group] * m.rate for m in ensemble.members if weights[m.group] > 0}
    assert answer.task == TASKS[0] and answer.routing is None
    written = loaded().predict("written", [read_rows("written")[0]["text"]])[0]
    assert written.members == written.groups, "free text is written without boosters"


def approximately(shares: dict[str, float] | None) -> object:
    return None if shares is None else pytest.approx(shares, rel=1e-4)


def test_questions_of_several_tasks_are_answered_as_they_are_alone():
    run = loaded()
    questions = [
        Question(TASKS[0], [row["text"] for row in read_rows(TASKS[0])[:3]]),
        Question(None, [row["text"] for row in read_rows(TASKS[3])[:2]]),
        Question("written", [read_rows("written")[0]]),
        Question(TASKS[0], [read_rows(TASKS[0])[3]["text"]]),
        Question(None, []),
        Question(None, [read_rows(TASKS[0])[0]["text"]]),
    ]
    together = run.predict_all(questions)
    assert [len(found) for found in together] == [3, 2, 1, 1, 0, 1]
    for question, found in zip(questions, together, strict=True):
        for one, other in zip(run.predict(question.task, question.rows), found, strict=True):
            assert (one.label, one.task, one.groups) == (other.label, other.task, pytest.approx(other.groups))
            for name in ("routing", "probabilities"):
                assert getattr(one, name) == approximately(getattr(other, name))


def test_rows_of_one_task_share_passes_whoever_asks():
    run, rows = loaded(), [row["text"] for row in read_rows(TASKS[0])[:4]]
    passes: list[int] = []
    last = run._model[0].network.model.layers[-1]
    hook = last.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        counts = []
        for questions in ([Question(TASKS[0], rows)], [Question(TASKS[0], [row]) for row in rows]):
            passes.clear()
            run.predict_all(questions)
            counts.append(len(passes))
    finally:
        hook.remove()
    assert counts[0] == counts[1] > 0


def test_rows_that_no_task_reads_are_refused_before_anything_is_run(monkeypatch):
    run = loaded()
    monkeypatch.setattr("ensemblelora.api.predict_weighted", None)
    with pytest.raises(DataError, match="row 2 of 2: no task of this run can be asked with what it brings"):
        run.predict(None, ["a text", {"words": "fire"}])
    with pytest.raises(UsageError, match="no task named: text 1 of 1 is empty"):
        run.predict(None, [" "])
    with pytest.raises(UsageError, match="no task named: got one text"):
        run.predict(None, "a text")


def test_the_router_is_kept_read_back_and_made_again_for_other_inputs(tmp_path, caplog):
    copy_run(tmp_path)
    run = load_run(tmp_path / "run")
    adapted, _ = loaded()._model
    cards, kinds = list(run.cards.values()), list(run.kinds.values())
    first = open_router(run.path, run.config, cards, kinds, adapted)
    stamp = (run.path / "routing.npz").stat().st_mtime_ns
    read = open_router(run.path, run.config, cards, kinds, adapted)
    assert (run.path / "routing.npz").stat().st_mtime_ns == stamp
    assert (read.temperature, read.formats) == (first.temperature, first.formats)
    np.testing.assert_array_equal(read.directions, first.directions)
    record = artifacts.read_json(run.path / "routing.json")
    assert np.sum(record["validation"]["confusion"]) == 12 * len(TASKS)
    assert record["validation"]["nll"] <= np.log(len(TASKS)) + 1e-6, "a fitted temperature never does worse than chance"
    fewer = open_router(run.path, run.config, cards[:2], kinds[:2], adapted)
    assert fewer.task_names == TASKS[:2]
    (run.path / "routing.npz").write_bytes(b"damaged")
    said = io.StringIO()
    with announcing(Console(file=said)):
        again = open_router(run.path, run.config, cards, kinds, adapted)
    assert said.getvalue().startswith("learning which task a text belongs to (routing): ")
    np.testing.assert_array_equal(again.directions, first.directions)
    (run.path / "routing.json").write_text("[]", encoding="utf-8")
    assert open_router(run.path, run.config, cards, kinds, adapted).temperature == first.temperature


def test_rows_that_cannot_be_read_are_named_with_the_way_out(tmp_path):
    run = loaded()
    gone = [card.model_copy(update={"dataset_kwargs": {"data_files": {}}}) for card in run.cards.values()]
    adapted, _ = run._model
    with pytest.raises(DataError, match=r"routing is fitted to the run's rows, which can't be read: .*; name a task"):
        open_router(tmp_path, run.config, gone, list(run.kinds.values()), adapted)


def test_a_folder_that_cannot_be_written_keeps_no_router(tmp_path, monkeypatch):
    run = loaded()
    adapted, _ = run._model
    place = tmp_path / "file"
    place.write_text("", encoding="utf-8")
    router = open_router(place, run.config, list(run.cards.values()), list(run.kinds.values()), adapted)
    assert router.task_names == TASKS and place.read_text(encoding="utf-8") == ""


def test_texts_of_other_subjects_are_routed_to_their_task(tmp_path):
    # The same run with one task's texts in other words altogether.
    recipe = copy_run(tmp_path)
    run = load_run(tmp_path / "run")
    card = run.cards[TASKS[2]]
    rows = {}
    for split in ("train", "validation", "test"):
        file = tmp_path / "tasks" / f"{TASKS[2]}.{split}.jsonl"
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        rows[split] = [{"text": "0 1 2 3 " * 3 + str(i), "label": row["label"]} for i, row in enumerate(lines)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[split]), encoding="utf-8")
    files = {split: str(tmp_path / "tasks" / f"{TASKS[2]}.{split}.jsonl") for split in rows}
    changed = card.model_copy(update={"dataset_kwargs": {"data_files": files}})
    cards = {**run.cards, TASKS[2]: changed}
    adapted, _ = loaded()._model
    router = open_router(run.path, run.config, list(cards.values()), list(run.kinds.values()), adapted)
    texts = [row["text"] for row in rows["test"]]
    options = {"max_length": 64, "max_tokens": 512}
    scores = score_tasks(router, embed_texts(adapted, texts, **options))
    shares = weigh_tasks(router, scores)
    assert (shares.argmax(axis=1) == 2).all() and shares[:, 2].min() > 0.5
    assert recipe.exists()


def test_predict_without_a_task_says_what_it_took_the_text_for(capsys):
    text = read_rows(TASKS[0])[0]["text"]
    assert main(["predict", str(finished_run() / "run"), "--text", text]) == 0
    shown = capsys.readouterr().out
    answer = loaded().predict(None, [text])[0]
    assert answer.probability is not None and answer.task_probability == pytest.approx(max(answer.routing.values()))
    cells = [answer.label, f"{answer.probability:.0%}", next(iter(answer.routing)), f"{answer.task_probability:.0%}"]
    assert shown.splitlines()[1].split() == ["1", *cells]
    assert main(["predict", str(finished_run() / "run"), "--text", text, "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)[0]
    assert entry["task"] == answer.task and entry["routing"] == pytest.approx(answer.routing)
