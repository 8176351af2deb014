"""The examples' models with tables on servers, in real processes, are one device's: parameters, state, losses and scores.

One job for each number of trainers trains all variants (a model and an optimizer) of it. `make equality` runs more: all
variants, more servers, tables in pieces, other dense layers, nothing asked for ahead.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from syncwright import ParameterServer
from syncwright.runtime.sharding import part_of
from tests.distributed import example_job as job
from tests.distributed.example_job import EXACT, Setting, of
from tests.distributed.example_references import (
    SIZE,
    Ended,
    auc,
    data,
    differences,
    is_exact,
    one_device,
    reference_of,
    start,
)

pytestmark = pytest.mark.processes

SETTINGS = {
    "2 trainers": Setting(2, variants=of("flights", *EXACT, "SparseAdam") + of("clicks", "lazy")),
    "3 trainers": Setting(
        3, dense=ParameterServer(), own=False, variants=of("clicks", *EXACT, "SparseAdam") + of("flights", "lazy")
    ),
}
"""Every variant once; `make equality` runs all of them in each setting."""


@pytest.fixture(scope="module", params=SETTINGS)
def ended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Setting, Ended]:
    setting = SETTINGS[request.param]
    return setting, start(setting, tmp_path_factory.mktemp("job"))


def test_tables_on_servers_are_one_device(ended: tuple[Setting, Ended]) -> None:
    assert differences(*ended) == []


def test_the_area_under_the_curve_is_one_devices(ended: tuple[Setting, Ended]) -> None:
    setting, done = ended
    for variant in setting.variants:
        ours = auc(data(), variant[0], done.outcomes[variant].scores)
        split = auc(data(), variant[0], one_device(reference_of(variant), setting.trainers).scores)
        whole = auc(data(), variant[0], one_device(reference_of(variant), None).scores)
        assert ours == pytest.approx(split, abs=0 if is_exact(setting, variant) else 1e-4), variant
        assert ours == pytest.approx(whole, abs=1e-3), variant


def test_every_trainer_returns_the_same(ended: tuple[Setting, Ended]) -> None:
    first, *others = ended[1].reports
    for other in others:
        assert torch.equal(torch.tensor(first["losses"]), torch.tensor(other["losses"]))
        assert all(map(torch.equal, first["scores"], other["scores"]))


def test_tables_are_spread_and_their_rows_are_asked_for_ahead(ended: tuple[Setting, Ended]) -> None:
    """Of momentum and Adam an update is a pass over the table; of the others only rows are written, or travel ahead."""
    setting, done = ended
    tables = [s for s in done.plan.sharings if "embeddings" in s.variable or "tables" in s.variable]
    assert {owner for s in tables for owner in s.owners} == {0, 1}
    whole = {s.variable for s in tables if s.rows == "all"}
    assert whole == {s.variable for s in tables if s.variable.split(".")[1] in ("momentum", "Adam")}
    assert whole
    assert whole != {s.variable for s in tables}
    touched = {s.variable for s in tables if s.rows == "touched"}
    for rank, report in enumerate(done.reports):
        ahead = Counter(channel for channel, later in report["asked"] if later == 1)
        assert {channel: ahead[channel] for channel in touched} == dict.fromkeys(touched, ahead_of(setting, rank))


def ahead_of(setting: Setting, rank: int) -> int:
    """How many batches are known ahead: all but the first two, and the last where the trainer's part of it is smaller."""
    first, last = (part_of(data().batches(SIZE)[at], setting.trainers, rank) for at in (0, -1))
    return job.STEPS - 2 - (len(last[0]) < len(first[0]))  # type: ignore[index]


def test_rows_that_no_batch_has_touched_stay_as_they_were(ended: tuple[Setting, Ended]) -> None:
    """To the bit, where updates are lazy; Adam moves them on where it is exact only if it has ever touched them."""
    setting, done = ended
    for kind, name in setting.variants:
        if name in ("lazy", "SparseAdam"):
            before = dict(job.one_model(data(), kind, name).named_parameters())
            table = "embeddings.plane.weight" if kind == "flights" else "tables.categories.2.weight"
            after = done.outcomes[kind, name].values[table]
            column = data().train[0][:, 1] if kind == "flights" else data().train[4][:, 2] % len(after)
            untouched = torch.ones(len(after), dtype=torch.bool)
            untouched[column] = False
            assert untouched.any()
            assert torch.equal(after[untouched], before[table][untouched])
            assert not torch.equal(after[~untouched], before[table][~untouched])
