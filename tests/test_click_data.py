"""The click logs of examples/clicks.py: text into records, records into each trainer's batches, and what can be learnt."""

from __future__ import annotations

import gzip
from pathlib import Path

import clicks
import criteo
import invented_clicks
import numpy as np
import pytest
import torch

LINE = "\t".join(["1", "0", "-1", "", "7", *["3"] * 9, "68fd1e64", "", "ffffffff", *["00000001"] * 23]) + "\n"


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("log") / "log.txt"
    invented_clicks.write(path, 1500)
    return path


@pytest.fixture(scope="module")
def parts(log: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """1500 records in parts of 400, 400, 400 and 300."""
    return criteo.convert([log], tmp_path_factory.mktemp("parts"), 400)


def test_a_line_becomes_a_record(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text(LINE)
    ((record,),) = criteo.records([path])
    assert record["clicked"] == 1
    assert record["counts"][:4].tolist() == [0.0, 0.0, 0.0, pytest.approx(np.log(8))]
    assert record["ids"][:4].tolist() == [0x68FD1E64, 0, 0xFFFFFFFF, 1]
    counts, ids, clicked = criteo.batch_of(np.array([record]))
    assert (counts.dtype, ids.dtype, clicked.dtype) == (torch.float32, torch.int64, torch.float32)
    assert ids[0, 2] == 0xFFFFFFFF


def test_compressed_text_is_the_same(log: Path, tmp_path: Path) -> None:
    packed = tmp_path / "log.txt.gz"
    packed.write_bytes(gzip.compress(log.read_bytes()))
    one, other = (np.concatenate(list(criteo.records([path], at_once=600))) for path in (log, packed))
    assert len(one) == 1500
    assert np.array_equal(one, other)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (LINE.replace("68fd1e64", "green"), "green"),
        ("1\t2\t3\n", "found 3 columns, expected 40"),
        (LINE.replace("\t7\t", "\tseven\t"), "seven"),
    ],
)
def test_another_format_is_refused(text: str, found: str, tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"log\.txt: expected lines in Criteo's format: .*{found}"):
        list(criteo.records([path]))


def test_parts_hold_every_record_in_order(log: Path, parts: list[Path]) -> None:
    assert [len(np.load(part)) for part in parts] == [400, 400, 400, 300]
    assert np.array_equal(
        np.concatenate([np.load(part) for part in parts]), np.concatenate(list(criteo.records([log])))
    )
    with pytest.raises(FileExistsError, match="expected an empty folder"):
        criteo.convert([log], parts[0].parent)


@pytest.mark.parametrize("trainers", [1, 2, 3])
def test_trainers_read_their_own_parts_and_together_all(parts: list[Path], trainers: int) -> None:
    readers = [criteo.OwnParts(parts, 70, trainers, rank) for rank in range(trainers)]
    assert len({len(reader) for reader in readers}) == 1
    given = [list(reader) for reader in readers]
    assert all(len(batches) == len(readers[0]) for batches in given)
    for rank, batches in enumerate(given):
        share = len(np.array_split(np.arange(70), trainers)[rank])
        sizes = [len(ids) for _, ids, _ in batches]
        last = sum(size > 0 for size in sizes) - 1
        assert sizes[:last] == [share] * last
        assert sum(sizes[last + 1 :]) == 0
        of_files = np.concatenate([np.load(part) for part in parts[rank::trainers]])
        assert torch.equal(torch.cat([ids for _, ids, _ in batches]), criteo.batch_of(of_files)[1])
    for number, joined in enumerate(criteo.AllParts(parts, 70, trainers)):
        for at, tensor in enumerate(joined):
            assert torch.equal(tensor, torch.cat([batches[number][at] for batches in given]))


def test_what_no_trainer_can_read_is_refused(parts: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found 4 parts for 5 trainers"):
        criteo.OwnParts(parts, 70, 5, 0)
    with pytest.raises(ValueError, match="found batches of 1 for 2 trainers"):
        criteo.OwnParts(parts, 1, 2, 0)
    with pytest.raises(FileNotFoundError, match="holds no part"):
        criteo.parts_of(tmp_path)
    np.save(tmp_path / "part-00000.npy", np.zeros(3))
    with pytest.raises(ValueError, match="found an array of float64"):
        criteo.OwnParts(criteo.parts_of(tmp_path), 2)


def test_an_invented_log_is_the_same_every_time(log: Path) -> None:
    assert "".join(invented_clicks.lines(1500, 0)) == log.read_text()
    assert "".join(invented_clicks.lines(1500, 1)) != log.read_text()


def test_values_follow_a_power_law_up_to_their_number() -> None:
    found = invented_clicks.ranks(np.random.default_rng(0), 50_000)
    assert (found >= 0).all()
    assert (found < criteo.CARDINALITIES).all()
    widest = found[:, 2]
    often = np.bincount(widest[widest < 100], minlength=100) / 50_000
    assert 0.05 < often[0] < 0.3
    assert often[9] == pytest.approx(often[0] * 10.0**-invented_clicks.POWER, rel=0.4)
    assert len(np.unique(widest)) > 5000


@pytest.mark.parametrize("vocabulary", ["fixed", "unbounded"])
def test_training_on_clicks_learns_and_repeats(parts: list[Path], vocabulary: str) -> None:
    def losses() -> list[float]:
        torch.manual_seed(0)
        model = clicks.Model(clicks.make_tables(vocabulary, 1000, 50_000, 8, 0), criteo.CATEGORIES, 8)
        trainer = clicks.OneDevice(clicks.step, model, clicks.make_optimizer(model))
        return clicks.train(trainer, criteo.AllParts(parts, 64), epochs=3, limit_steps=60)

    first = losses()
    assert len(first) == 60
    assert first == losses()
    assert sum(first[-10:]) < 0.9 * sum(first[:10])
