"""Which part of a global batch is a trainer's."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from syncwright.errors import BatchError
from syncwright.runtime.sharding import part_of, shard

X, Y = torch.arange(10.0).view(5, 2), torch.arange(5)


def parts(batch: object, trainers: int = 2, whole: tuple[str, ...] = ()) -> list:
    return [part_of(batch, trainers, rank, whole) for rank in range(trainers)]


def test_tensors_of_the_batch_size_are_cut_and_others_given_to_all() -> None:
    weights, scale = torch.ones(3), torch.tensor(2.0)
    first, second = parts((X, {"y": Y, "weights": weights}, scale, "name"))
    assert first[0].tolist() == X[:3].tolist()
    assert second[0].tolist() == X[3:].tolist()
    assert (first[1]["y"].tolist(), second[1]["y"].tolist()) == ([0, 1, 2], [3, 4])
    for part in (first, second):
        assert part[1]["weights"] is weights
        assert part[2] is scale
        assert part[3] == "name"


def test_the_first_tensor_with_axes_gives_the_size() -> None:
    first, second = parts((torch.tensor(1.0), Y, X))
    assert (len(first[1]), len(second[1]), len(first[2]), len(second[2])) == (3, 2, 3, 2)


def test_a_tensor_that_happens_to_be_as_long_is_given_to_all_by_name() -> None:
    weights = torch.arange(5.0)
    assert [part[2].tolist() for part in parts((X, Y, weights))] == [[0.0, 1.0, 2.0], [3.0, 4.0]]
    for part in parts((X, Y, weights), whole=("batch.2",)):
        assert part[2].tolist() == weights.tolist()
        assert len(part[1]) < 5
    for part in parts({"x": X, "weights": weights}, whole=("batch.0.weights",)):
        assert part["weights"].tolist() == weights.tolist()


def test_a_name_that_no_tensor_has_is_refused() -> None:
    with pytest.raises(BatchError, match=r"'batch\.3'; expected some of batch\.0, batch\.1\."):
        parts((X, Y), whole=("batch.3",))


def collate(rows: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows]), torch.ones(4)


def test_a_collate_function_may_add_what_goes_to_all() -> None:
    """The last batch holds one example, so the second trainer's part is empty; the weights are whole all the same."""
    loader = DataLoader(list(zip(X, Y, strict=True)), batch_size=4, collate_fn=collate)  # type: ignore[arg-type]
    for rank, sizes in ((0, [2, 1]), (1, [2, 0])):
        found = list(shard(loader, 2, rank, lambda state: state))
        assert [len(x) for x, _, _ in found] == sizes
        assert [len(y) for _, y, _ in found] == sizes
        assert [len(weights) for _, _, weights in found] == [4, 4]


def test_an_iterable_of_batches_is_cut() -> None:
    batches = [(X, Y, torch.ones(3)), (X[:1], Y[:1], torch.ones(3))]
    found = [list(shard(batches, 2, rank, lambda state: state)) for rank in range(2)]
    assert [[tuple(map(len, batch)) for batch in own] for own in found] == [
        [(3, 3, 3), (1, 1, 3)],
        [(2, 2, 3), (0, 0, 3)],
    ]
