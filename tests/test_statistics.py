from __future__ import annotations

import math
import time

import numpy as np
import pytest
from numpy.typing import NDArray

from ipn_core.evaluation.statistics import (
    Interval,
    bootstrap_difference,
    bootstrap_mean,
    by_pictures,
    mcnemar,
    wilson,
)


def width(found: Interval) -> float:
    return found.high - found.low


# -- Wilson ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        # Newcombe (1998), table I: the score method without continuity correction.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_wilson_gives_the_published_intervals(right: int, n: int, low: float, high: float) -> None:
    assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_knows_nothing_without_questions() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


# -- McNemar -----------------------------------------------------------------------------------


def pairs(both: int, ours: int, theirs: int, neither: int) -> tuple[list[bool], list[bool]]:
    left = [True] * (both + ours) + [False] * (theirs + neither)
    right = [True] * both + [False] * ours + [True] * theirs + [False] * neither
    return left, right


@pytest.mark.parametrize(
    ("table", "p"),
    [
        # Fagerland, Lydersen & Laake, "The McNemar test for binary matched-pairs data", BMC
        # Medical Research Methodology 13:91 (2013), the exact conditional test on the data of
        # Bentur et al. (2009) and of Cavo et al. (2012).
        ((1, 1, 7, 12), 0.0703),
        ((59, 6, 16, 80), 0.0525),
        ((3, 0, 0, 4), 1.0),
        ((0, 5, 5, 0), 1.0),
        ((9, 0, 10, 2), 2 / 1024),
    ],
)
def test_mcnemar_gives_the_published_p_values(table: tuple[int, ...], p: float) -> None:
    ours, theirs = pairs(*table)
    assert mcnemar(ours, theirs) == pytest.approx(p, abs=5e-5)
    assert mcnemar(theirs, ours) == mcnemar(ours, theirs)


def test_mcnemar_stays_exact_where_floats_would_overflow() -> None:
    ours, theirs = pairs(0, 3000, 3200, 0)
    # The normal approximation, with continuity correction.
    z = (200 - 1) / math.sqrt(6200)
    assert mcnemar(ours, theirs) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-2)
    assert mcnemar([True] * 5000, [False] * 5000) == 0.0


def test_mcnemar_takes_numpys_truths_and_refuses_what_is_no_pair() -> None:
    ours, theirs = pairs(1, 1, 7, 12)
    assert mcnemar(np.array(ours), np.array(theirs)) == mcnemar(ours, theirs)
    with pytest.raises(ValueError, match="shorter"):
        mcnemar([True, True], [True])


# -- clusters ----------------------------------------------------------------------------------


def test_questions_about_the_same_pictures_form_a_cluster() -> None:
    found = by_pictures([["a"], ["b"], ["a", "b"], [], ["b", "a"], ["a"], []])
    assert found[0] == found[5]
    assert found[2] == found[4]
    assert len(set(found)) == 5


# -- bootstrap ---------------------------------------------------------------------------------


def answers(seed: int, runs: int, pictures: int, questions: int, shared: float) -> NDArray[np.bool]:
    """Answers that are right half of the time; `shared` of their chance is the picture's."""
    draw = np.random.default_rng(seed)
    picture = np.repeat(draw.normal(size=pictures), questions)
    own = draw.normal(size=(runs, pictures * questions))
    return math.sqrt(shared) * picture + math.sqrt(1 - shared) * own > 0


@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize("shared", [0.0, 0.7])
def test_intervals_hold_the_truth_as_often_as_they_say(runs: int, shared: float) -> None:
    clusters = np.repeat(np.arange(40), 4).tolist()
    trials = 200
    held = 0
    for trial in range(trials):
        found = bootstrap_mean(answers(trial, runs, 40, 4, shared), clusters, draws=200, seed=trial)
        held += found.low <= 0.5 <= found.high
    # Of 200 trials at 93 %, which is what 40 clusters can give, fewer than 172 come up once in ten
    # thousand times. Runs that share nothing are covered more often than they need be.
    assert held >= 172
    if runs == 1:
        assert held < 200


def test_a_difference_is_held_as_often_as_its_interval_says() -> None:
    clusters = np.repeat(np.arange(40), 4).tolist()
    held = 0
    for trial in range(200):
        draw = np.random.default_rng(trial)
        picture = np.repeat(draw.normal(size=40), 4)
        ours, theirs = (picture + draw.normal(size=(1, 160)) for _ in range(2))
        found = bootstrap_difference(ours + 0.3, theirs, clusters, draws=200, seed=trial)
        held += found.low <= 0.3 <= found.high
    assert 172 <= held < 200


def test_the_interval_of_independent_answers_is_wilsons() -> None:
    values = answers(0, 1, 400, 1, 0.0)
    found = bootstrap_mean(values, range(400))
    low, high = wilson(int(values.sum()), 400)
    assert found.mean == values.mean()
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.008)


def test_questions_that_stand_and_fall_with_their_picture_widen_the_interval() -> None:
    values = np.repeat(answers(1, 1, 50, 1, 0.0), 8, axis=1)
    clusters = np.repeat(np.arange(50), 8).tolist()
    alone = bootstrap_mean(values, range(400))
    together = bootstrap_mean(values, clusters)
    assert together.mean == alone.mean
    # Eight copies of an answer are worth one: √8 times as wide.
    assert width(together) / width(alone) == pytest.approx(math.sqrt(8), rel=0.12)
    assert together == bootstrap_mean(values[:, ::8], range(50))


def test_clusters_count_by_their_size() -> None:
    # One large cluster of wrong answers among many small ones of right ones.
    values = np.array([[0.0] * 30 + [1.0] * 30])
    clusters = ["large"] * 30 + list(range(30))
    found = bootstrap_mean(values, clusters)
    assert found.mean == 0.5
    # Without the large one (in 36 % of draws) all are right; with it three times, a quarter.
    assert found.high == 1.0
    assert 0.2 < found.low < 0.3


def test_runs_that_differ_widen_the_interval() -> None:
    one = answers(2, 1, 200, 1, 0.0).astype(float)
    same = np.repeat(one, 3, axis=0)
    differing = same + np.array([[-0.2], [0.0], [0.2]])
    clusters = range(200)
    assert bootstrap_mean(same, clusters).mean == pytest.approx(one.mean())
    assert width(bootstrap_mean(same, clusters)) == pytest.approx(
        width(bootstrap_mean(one, clusters)), rel=0.1
    )
    assert width(bootstrap_mean(differing, clusters)) > 2 * width(bootstrap_mean(same, clusters))


def test_three_runs_that_differ_give_their_range() -> None:
    values = np.repeat([[0.1], [0.2], [0.6]], 500, axis=1)
    found = bootstrap_mean(values, range(500))
    assert (found.mean, found.low, found.high) == pytest.approx((0.3, 0.1, 0.6))


def test_equal_models_differ_by_nothing() -> None:
    values = answers(3, 3, 50, 4, 0.5)
    clusters = np.repeat(np.arange(50), 4).tolist()
    assert bootstrap_difference(values, values, clusters) == Interval(0.0, 0.0, 0.0)


def test_as_many_runs_are_drawn_as_pairs_and_others_on_their_own() -> None:
    clusters = range(300)
    base = answers(4, 1, 300, 1, 0.0).astype(float)
    # Both sides' seeds shift the score alike; what differs is 0.1 for every seed.
    theirs = base + np.array([[-0.3], [0.0], [0.3]])
    paired = bootstrap_difference(theirs + 0.1, theirs, clusters)
    assert paired.mean == pytest.approx(0.1)
    assert width(paired) == pytest.approx(0.0, abs=1e-12)
    lonely = bootstrap_difference((theirs + 0.1)[:2], theirs, clusters)
    assert lonely.mean == pytest.approx(0.1 - 0.15)
    assert width(lonely) > 0.5


def test_both_sides_answer_the_same_questions_drawn() -> None:
    # Questions vary much and the models hardly, so that pairs say more than two means.
    base = np.random.default_rng(5).normal(size=(1, 400))
    noise = 0.01 * np.random.default_rng(6).normal(size=(2, 400))
    theirs = np.concatenate([base, base]) + noise
    found = bootstrap_difference(base + 0.05, theirs, range(400))
    assert found.low < found.mean < found.high
    assert width(found) < 0.1 * width(bootstrap_mean(base, range(400)))


def test_questions_about_one_picture_are_drawn_one_by_one() -> None:
    values = answers(7, 1, 100, 1, 0.0)
    assert bootstrap_mean(values, ["p"] * 100) == bootstrap_mean(values, range(100))
    assert width(bootstrap_mean(values, ["p"] * 100)) > 0.1


def test_the_seed_decides_the_draws() -> None:
    values = answers(8, 2, 30, 2, 0.5)
    clusters = np.repeat(np.arange(30), 2).tolist()
    assert bootstrap_mean(values, clusters, seed=1) == bootstrap_mean(values, clusters, seed=1)
    assert bootstrap_mean(values, clusters, seed=1) != bootstrap_mean(values, clusters, seed=2)


def test_blocks_of_draws_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = answers(9, 1, 30, 2, 0.5)
    clusters = np.repeat(np.arange(30), 2).tolist()
    whole = bootstrap_mean(values, clusters, draws=4001)
    monkeypatch.setattr("ipn_core.evaluation.statistics.BLOCK", 30 * 7)
    parts = bootstrap_mean(values, clusters, draws=4001)
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), abs=0.02)


def test_what_is_no_table_of_runs_and_questions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected values \(runs, questions\).* got \(3,\)"):
        bootstrap_mean([1.0, 0.0, 1.0], range(3))
    with pytest.raises(ValueError, match=r"got \(1, 0\)"):
        bootstrap_mean(np.zeros((1, 0)), [])
    with pytest.raises(ValueError, match="got 3 questions, but the clusters of 2"):
        bootstrap_difference(np.zeros((1, 3)), np.zeros((1, 3)), range(2))
    with pytest.raises(ValueError, match="got 2 questions, but the clusters of 3"):
        bootstrap_difference(np.zeros((1, 3)), np.zeros((1, 2)), range(3))


def test_three_seeds_of_ten_thousand_questions_take_seconds() -> None:
    ours, theirs = answers(10, 3, 1000, 10, 0.3), answers(11, 3, 1000, 10, 0.3)
    clusters = np.repeat(np.arange(1000), 10).tolist()
    start = time.process_time()
    bootstrap_difference(ours, theirs, clusters)
    bootstrap_mean(ours, range(10_000))
    assert time.process_time() - start < 4
