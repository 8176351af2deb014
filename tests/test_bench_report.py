"""The figures of bench/report.py on numbers that can be checked by hand."""

import pytest

from bench import report

TIMES = {
    "limit": [1.0, 1.0, 1.0, 1.0, 1.0],
    "ours": [1.1, 1.1, 1.1, 1.1, 1.1],
    "fast peer": [1.2, 1.2, 1.2, 1.2, 1.2],
    "slow peer": [2.0, 2.1, 2.2, 2.3, 2.4],
}


def result(seconds, losses=(3.0, 2.0), cold=(), warm=(1.0,), reference="ddp-compile"):
    return {
        "status": "measured",
        "seconds_per_step": list(seconds),
        "losses": list(losses),
        "loss_reference": reference,
        "first_step_seconds": {"cold": list(cold), "warm": list(warm)},
        "peaks_mb": {"rank 0": 300.0, "rank 1": 310.0},
    }


def test_figures_without_spread_have_no_interval():
    figure = report.overhead_ratio(TIMES, "ours", "fast peer", "limit")
    assert figure.value == pytest.approx(0.5)
    assert (figure.low, figure.high) == (pytest.approx(0.5), pytest.approx(0.5))


def test_an_interval_holds_the_median_and_stays_among_the_samples():
    figure = report.median_seconds(TIMES, "slow peer")
    assert figure.value == 2.2
    assert 2.0 <= figure.low <= figure.value <= figure.high <= 2.4


def test_the_same_samples_give_the_same_interval():
    assert report.ratio(TIMES, "slow peer", "limit") == report.ratio(TIMES, "slow peer", "limit")


def test_rounds_are_resampled_whole():
    """A drift that hits both alike leaves their ratio exact."""
    drift = [1.0, 1.3, 0.9, 2.0, 1.1, 1.7, 1.2]
    times = {"a": [3.0 * d for d in drift], "b": [2.0 * d for d in drift]}
    figure = report.ratio(times, "a", "b")
    assert (figure.low, figure.high) == (pytest.approx(1.5), pytest.approx(1.5))


def test_an_overhead_over_a_peer_that_has_none_is_not_defined():
    times = {**TIMES, "fast peer": [0.9] * 5}
    assert report.overhead_ratio(times, "ours", "fast peer", "limit").value is None


def test_the_fastest_of_those_that_were_measured():
    assert report.fastest(TIMES, ["slow peer", "fast peer", "absent"]) == "fast peer"
    assert report.fastest(TIMES, ["absent"]) is None


def test_loss_difference():
    assert report.loss_difference([4.0, 2.5], [4.0, 2.0]) == (0.5, 0.125)
    with pytest.raises(ValueError, match="same steps"):
        report.loss_difference([4.0], [4.0, 2.0])


def test_who_was_not_measured_keeps_the_reason_and_has_no_figure():
    results = {
        "ddp-compile": result(TIMES["fast peer"]),
        "syncwright": {"status": "not available: no such module", "loss_reference": "ddp-compile"},
    }
    ours = report.rows(results, ["ddp-compile"], "limit", bare_mb=200.0)[1]
    assert ours.status == "not available: no such module"
    assert ours.step.value is None
    shows = report.workload_shows("mlp", results, ["ddp-compile"], "syncwright", "limit", "ddp-compile")
    assert [show.value for show in shows] == [None] * 4
    assert [show.holds for show in shows] == [None] * 4
    assert all("syncwright" in show.note for show in shows)


def test_a_row():
    results = {
        "limit": result(TIMES["limit"], reference="alone"),
        "ddp-compile": result(TIMES["fast peer"], cold=[20.0, 30.0, 25.0]),
    }
    row = report.rows(results, ["ddp-compile"], "limit", bare_mb=200.0)[1]
    assert row.over_limit.value == pytest.approx(1.2)
    assert row.over_best.value == 1.0
    assert (row.first_cold, row.first_warm) == (25.0, 1.0)
    assert (row.peak_mb, row.above_bare_mb) == (310.0, 110.0)
    assert (row.loss_absolute, row.loss_relative) == (0.0, 0.0)


def test_shows_of_a_workload():
    results = {
        "limit": result(TIMES["limit"], reference="alone"),
        "syncwright": result(TIMES["ours"], losses=[3.0, 2.1], cold=[21.0], warm=[2.0]),
        "ddp-compile": result(TIMES["fast peer"], cold=[20.0], warm=[1.0]),
    }
    shows = report.workload_shows("gpt", results, ["ddp-compile"], "syncwright", "limit", "ddp-compile")
    overhead, losses, cold, warm = shows
    assert (overhead.value, overhead.holds) == (pytest.approx(0.5), True)
    assert (losses.value, losses.holds) == (pytest.approx(0.1), False)
    assert (cold.value, cold.holds) == (pytest.approx(1.05), True)
    assert (warm.value, warm.holds) == (pytest.approx(2.0), False)


def test_update_show():
    update = {"seconds": {"syncwright": [0.5, 0.5], "torch": [1.0, 1.0]}, "missing": {}}
    assert report.update_show(update, "syncwright", "torch").holds is True
    missing = {"seconds": {"torch": [1.0, 1.0]}, "missing": {"syncwright": "not yet"}}
    show = report.update_show(missing, "syncwright", "torch")
    assert (show.value, show.holds, show.note) == (None, None, "not yet")
