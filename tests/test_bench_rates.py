"""The figures of bench/rates.py and what must move, on numbers that can be checked by hand."""

import numpy as np
import pytest

from bench import rates
from bench.must_move import bytes_per_step
from bench.server_workloads import counts, shares
from bench.sparse_workloads import WORKLOADS, Recommender, log_spaced, power_law, scattered


def result(seconds, minibatches=2, step_bytes=None, losses=(3.0, 2.0), reference="one-device", peaks=None):
    return {
        "status": "measured",
        "seconds_per_step": list(seconds),
        "minibatches_per_step": minibatches,
        "losses": list(losses),
        "loss_reference": reference,
        "peaks_mb": peaks or {},
        "step_bytes": step_bytes,
    }


RESULTS = {
    "alone": result([0.01] * 3, minibatches=1, reference=None),
    "one-device": result([0.02] * 3, reference=None),
    "peer": result(
        [0.04] * 3,
        step_bytes=3e6,
        peaks={"peer rank 0": 300.0, "peer rank 1": 320.0, "peer server 0": 500.0, "raylet 7": 90.0},
    ),
    "slow": result([0.08] * 3, losses=(3.0, 2.2)),
    "absent": {"status": "not available: not installed: make bench-peers"},
}


def test_a_rate_counts_the_minibatches_of_all_trainers():
    alone, one_device, peer, *_ = rates.rates(RESULTS, ["peer", "slow"], "alone", needed=2e6)
    assert alone.per_second.value == pytest.approx(100.0)  # one minibatch in 10 ms
    assert one_device.per_second.value == pytest.approx(100.0)  # two in 20 ms
    assert peer.per_second.value == pytest.approx(50.0)
    assert peer.over_limit.value == pytest.approx(0.5)
    assert peer.over_best.value == 1.0


def test_bytes_stand_against_those_that_must_move():
    peer = rates.rates(RESULTS, ["peer"], "alone", needed=2e6)[2]
    assert (peer.step_mb, peer.over_needed) == (3.0, 1.5)


def test_bytes_that_were_not_counted_are_not_zero():
    slow = rates.rates(RESULTS, ["peer"], "alone", needed=2e6)[3]
    assert (slow.step_mb, slow.over_needed) == (None, None)
    counted_nothing_needed = rates.rates(RESULTS, ["peer"], "alone", needed=None)[2]
    assert (counted_nothing_needed.step_mb, counted_nothing_needed.over_needed) == (3.0, None)


def test_memory_of_ranks_and_of_everybody_else():
    peer = rates.rates(RESULTS, ["peer"], "alone", None)[2]
    assert (peer.rank_mb, peer.other_mb) == (320.0, 500.0)


def test_a_name_that_begins_another_does_not_take_its_memory():
    by_process = {"syncwright rank 0": 1.0, "syncwright-async rank 0": 2.0}
    assert rates.peaks(by_process, "syncwright") == ([1.0], [2.0])


def test_who_was_not_measured_keeps_the_reason():
    absent = rates.rates(RESULTS, ["peer"], "alone", None)[-1]
    assert absent.status == "not available: not installed: make bench-peers"
    assert absent.per_second.value is None


def test_who_does_not_compute_the_same_is_named():
    found = rates.rates(RESULTS, ["peer"], "alone", None)
    assert found[3].loss == pytest.approx(0.2 / 3.0)
    assert found[2].loss == 0.0
    assert rates.disagreeing(found) == ["slow"]


def test_a_loss_that_is_not_a_number_does_not_agree():
    results = {**RESULTS, "slow": result([0.08] * 3, losses=(float("nan"), 2.0))}
    assert rates.disagreeing(rates.rates(results, ["peer"], "alone", None)) == ["slow"]


def test_without_the_limit_nothing_is_compared_with_it():
    (peer,) = rates.rates({"peer": RESULTS["peer"]}, ["peer"], "alone", None)
    assert peer.over_limit.value is None
    assert peer.loss is None


def test_a_transfer():
    results = {"zmq": result([0.1] * 3), "ours": result([0.15] * 3), "gone": {"status": "failed: ended"}}
    bare, ours, gone = rates.transfers(results, nbytes=10_000_000, trainers=2, bare=("zmq", "gloo"))
    assert ours.milliseconds.value == pytest.approx(150.0)
    assert bare.gigabytes == pytest.approx(0.4)  # 2 trainers x 10 MB x both ways in 0.1 s
    assert [figure.value for figure in ours.over] == [pytest.approx(1.5), None]
    assert (gone.status, gone.gigabytes) == ("failed: ended", None)


def test_bytes_of_one_trainer():
    assert bytes_per_step([[10]], row_nbytes=128, dense_nbytes=1000) == 10 * (2 * 128 + 8) + 2 * 1000


def test_bytes_are_summed_over_trainers_and_averaged_over_batches():
    assert bytes_per_step([[1, 3], [4, 4]], row_nbytes=4, dense_nbytes=0) == (2 + 4) * 16


# --- workloads -----------------------------------------------------------------------------------------


def test_variables_of_a_transfer_fill_it():
    assert counts(1024) == (128, 64, 32, 16, *[1] * 15, 1)
    assert sum(counts(10_000_000)) == 2_500_000
    assert min(counts(1_000_000)) > 0


def test_shares_of_servers():
    assert shares([8, 4, 2, 2], 2) == [[0], [1, 2, 3]]
    assert shares([5, 5], 1) == [[0, 1]]


def test_power_law_ranks_stay_among_the_rows_and_prefer_the_first():
    ranks = power_law(np.random.default_rng(0).random(100_000), rows=1000, power=1.05)
    assert (ranks.min(), ranks.max()) == (0, 999)
    first, second = (np.mean(ranks == place) for place in (0, 1))
    assert first > 1.5 * second > 0
    assert (power_law(np.array([0.0]), 1000, 1.05)[0], power_law(np.array([1.0]), 1000, 1.05)[0]) == (0, 999)


def test_scattering_keeps_the_rows_apart():
    assert sorted(scattered(np.arange(1000), 1000)) == list(range(1000))


def test_sizes_are_log_spaced():
    assert log_spaced(10, 1000, 3) == (10, 100, 1000)


def small(**changes):
    given = {
        "name": "small",
        "rows": (50, 20),
        "width": 4,
        "ids": 1,
        "power": 1.05,
        "bottom": (8, 4),
        "dots": True,
        "top": (6,),
        "batch": 16,
        "optimizer_name": "sgd",
        "lr": 0.1,
    }
    return Recommender(**{**given, **changes})


@pytest.mark.parametrize("recommender", [small(), small(ids=3, bottom=(), dots=False, power=None)], ids=["dots", "cat"])
def test_a_recommender_is_the_same_each_time_and_its_gradients_may_be_sparse(recommender):
    batch = recommender.batches(0)[0]
    dense, sparse = (recommender.model(sparse) for sparse in (False, True))
    losses = [model(*batch) for model in (dense, sparse)]
    assert losses[0].item() == losses[1].item()
    for loss in losses:
        loss.backward()
    for table, other in zip(dense.tables, sparse.tables, strict=True):
        assert other.weight.grad.is_sparse
        assert table.weight.grad.allclose(other.weight.grad.to_dense())


def test_trainers_get_different_batches_and_each_the_same_again():
    recommender = small()
    (first, *_), (again, *_), (other, *_) = (recommender.arrays(rank) for rank in (0, 0, 1))
    assert np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])


def test_unique_rows_are_counted_table_by_table():
    assert small().unique_rows(np.array([[1, 1], [1, 2], [3, 2]])) == 2 + 2


def test_the_large_workloads_are_those_that_are_promised():
    bag, dlrm = WORKLOADS["bag-sgd"], WORKLOADS["dlrm-sgd"]
    assert (bag.rows, bag.width, bag.ids, bag.batch, bag.joined) == ((200_000,), 32, 8, 512, 45)
    assert (len(dlrm.rows), dlrm.rows[0], dlrm.rows[-1], dlrm.width, dlrm.batch) == (26, 1_000, 2_000_000, 16, 1024)
