"""Tables of any ids in processes: what loopback gives, in step; and an end, asynchronously."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import syncwright
from syncwright.runtime.sharding import part_of
from tests.distributed import table_job as job
from tests.distributed.launching import launched

pytestmark = pytest.mark.processes


def reports_of(folder: Path, environment: dict[str, str], mode: str) -> list[dict]:
    script = str(Path(job.__file__))
    assert launched(script, [str(folder), mode], 2, 2, environment=environment) == 0
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_in_step_it_is_loopback(tmp_path: Path, environment: dict[str, str]):
    reports = reports_of(tmp_path, environment, "sync")
    model, optimizer = job.build()
    loopback = syncwright.loopback(job.step, model, optimizer, plan=job.plan("sync"), trainers=2, servers=2)
    table, since, losses, exports = model["table"], None, [], []
    for _ in range(2):
        for batch in DataLoader(job.data(), job.BATCH):
            parts = [part_of(tuple(batch), 2, rank) for rank in range(2)]
            losses.append(float(loopback.step(parts)))  # type: ignore[arg-type]
        loopback.observe(table, [job.shown(ids) for ids, _ in parts])
        exports.append(loopback.export(table, since))
        since = exports[-1].mark
    predictions = loopback.evaluate(job.predict, DataLoader(job.data(), 7))
    removed = loopback.shrink(table)
    loopback.sync()
    for report in reports:
        assert report["losses"] == pytest.approx(losses, rel=1e-5)
        assert torch.allclose(report["predictions"], predictions, atol=1e-5)
        assert torch.equal(report["removed"], removed)
        for number, saved in enumerate(exports, start=1):
            found = syncwright.nn.Saved.from_dict(report[f"export {number}"])
            assert (found.since, found.mark, found.now) == (saved.since, saved.mark, saved.now)
            order, other = found.rows.ids.argsort(), saved.rows.ids.argsort()
            assert torch.equal(found.rows.ids[order], saved.rows.ids[other])
            assert torch.allclose(found.rows.columns["sum"][order], saved.rows.columns["sum"][other], atol=1e-5)
        ended, optimizer = job.build()
        ended.load_state_dict(report["end"])
        assert torch.allclose(ended["table"].eval()(job.IDS), table.eval()(job.IDS), atol=1e-5)
    assert torch.equal(reports[0]["end"]["head.weight"], reports[1]["end"]["head.weight"])


def test_asynchronously_all_trainers_end_with_what_servers_have(tmp_path: Path, environment: dict[str, str]):
    first, second = (report["end"] for report in reports_of(tmp_path, environment, "async"))
    tables = []
    for end in (first, second):
        model, _ = job.build()
        model.load_state_dict(end)
        tables.append(model["table"].eval())
    assert tables[0].count() == tables[1].count() > 0
    assert torch.equal(tables[0](job.IDS), tables[1](job.IDS))
    assert tables[0].clock.tolist()[0] == 2 * 2 * 4, "a step of the table for each step of a trainer"
