"""Loaders that end after different numbers of batches: who has no more goes on with batches without examples."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest

import pytest
import torch
from torch import nn

import syncwright
from syncwright import AllReduce, LocalSteps, ParameterServer, Rules, Shard
from syncwright.errors import BatchError
from syncwright.runtime.loopback import Loopback
from syncwright.runtime.uneven import Ends, Words, is_together

NONE = (torch.empty(0, 1),)


class Said:
    """Words of trainers that are threads. Changes with every word."""

    def __init__(self) -> None:
        self.words: dict[str, str] = {}
        self.gone: set[int] = set()
        self.count = 0

    def of(self, trainer: int) -> Words:
        return _Mouth(self, trainer)


class _Mouth:
    def __init__(self, said: Said, trainer: int):
        self.said, self.trainer = said, trainer

    def say(self, key: str, value: str) -> None:
        self.said.words[key] = value
        self.said.count += 1

    def heard(self, key: str) -> str | None:
        return self.said.words.get(key)

    def hear(self, key: str, trainer: int, enough: Callable[[str], bool]) -> str:
        deadline = time.monotonic() + 20
        while (word := "0" if self.is_gone(trainer) else self.heard(key)) is None or not enough(word):
            assert time.monotonic() < deadline, "this trainer would wait for ever"
            time.sleep(0.001)
        return word

    def leave(self) -> None:
        self.said.gone.add(self.trainer)

    def is_gone(self, trainer: int) -> bool:
        return trainer in self.said.gone


def products(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
    """The gradient is the mean of x."""
    optimizer.zero_grad()
    loss = model(x).mean()
    loss.backward()
    optimizer.step()
    return loss


def silent(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
    """The same, of which nothing is averaged."""
    optimizer.zero_grad()
    errors = model(x).sum(1)
    errors.mean().backward()
    optimizer.step()
    return errors


def job_of(sync: object, trainers: int, step: Callable = products, **settings: object) -> Loopback:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5)
    rules = Rules(sync, **settings)  # type: ignore[arg-type]
    return syncwright.loopback(step, model, optimizer, plan=rules, trainers=trainers, servers=1)


def batches(*numbers: float) -> list[tuple[torch.Tensor]]:
    return [(torch.full((1, 1), float(each)),) for each in numbers]


def trained(job: Loopback, ends: Sequence[Ends], loaders: Sequence[list]) -> list[list[int]]:
    """By step how many examples each trainer has had."""
    given = [
        end.batches(loader, lambda: job.job, lambda batch: None) for end, loader in zip(ends, loaders, strict=True)
    ]
    found = []
    with ThreadPoolExecutor(len(given)) as pool:
        while any(parts := list(pool.map(lambda each: next(each, None), given))):
            assert all(part is not None for part in parts), "all end together"
            job.step(parts)  # type: ignore[arg-type]
            found.append([len(part[0]) for part in parts])  # type: ignore[index]
    return found


def one_device(*epochs: Sequence[list]) -> float:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5)
    for loaders in epochs:
        for parts in zip_longest(*loaders, fillvalue=NONE):
            products(model, optimizer, torch.cat([part[0] for part in parts]))
    return model.weight.item()


SHARINGS = {"all_reduce": AllReduce(), "zero1": Shard(stage=1), "zero3": Shard(stage=3), "servers": ParameterServer()}


@pytest.mark.parametrize("sharing", SHARINGS)
def test_the_mean_is_over_those_that_have_examples(sharing):
    """5, 3 and 1 batches, then 0, 2 and 4: what one device has of the same batches together."""
    job, said = job_of(SHARINGS[sharing], 3), Said()
    ends = [Ends(said.of(k), k, 3) for k in range(3)]
    first = [batches(1, 2, 3, 4, 5), batches(6, 7, 8), batches(9)]
    second = [[], batches(2, 3), batches(1, 1, 4, 4)]
    assert trained(job, ends, first) == [[1, 1, 1], [1, 1, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0]]
    assert said.count == 6, "a word at the beginning and one at the end, of each"
    assert trained(job, ends, second) == [[0, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 1]]
    job.sync()
    assert job.model.weight.item() == pytest.approx(one_device(first, second))


def test_loaders_that_end_together_give_nothing_more():
    job, said = job_of(AllReduce(), 2), Said()
    ends = [Ends(said.of(k), k, 2) for k in range(2)]
    assert trained(job, ends, [batches(1, 2), batches(3, 4)]) == [[1, 1]] * 2
    assert trained(job, ends, [[], []]) == []


def test_where_a_step_is_done_before_others_have_begun_it_each_says_where_it_is():
    """Over servers, of a step that returns nothing that is averaged; else there is a word at the beginning and one at the end."""
    loaders = [batches(1, 2, 3), batches(4)]
    for step, words in ((silent, 6), (products, 4)):
        job, said = job_of(ParameterServer(), 2, step), Said()
        ends = [Ends(said.of(k), k, 2) for k in range(2)]
        assert trained(job, ends, loaders) == [[1, 1], [1, 0], [1, 0]]
        assert said.count == words
        job.sync()
        assert job.model.weight.item() == pytest.approx(one_device(loaders))


def test_trainers_that_train_alone_go_on_to_where_they_meet():
    job, said = job_of(LocalSteps(2), 2), Said()
    ends = [Ends(said.of(k), k, 2) for k in range(2)]
    assert trained(job, ends, [batches(1, 2, 3), batches(4)]) == [[1, 1], [1, 0], [1, 0]]


def test_nobody_waits_where_updates_come_as_they_come():
    job, said = job_of(ParameterServer(mode="async"), 2, clip="per_trainer"), Said()
    job.open(batches(1)[0])
    ends = Ends(said.of(0), 0, 2)
    assert len(list(ends.batches(batches(1, 2), lambda: job.job, lambda batch: None))) == 2


@pytest.mark.parametrize(
    ("sync", "expected"),
    [
        (AllReduce(), True),
        (ParameterServer(), True),
        (ParameterServer(mode="async"), False),
        (ParameterServer(mode="async", staleness=2), True),
        (LocalSteps(2), True),
    ],
)
def test_who_waits_for_others(sync, expected):
    job = job_of(sync, 2, clip="per_trainer")
    job.open(batches(1)[0])
    assert job.job is not None
    assert is_together(job.job) == expected


def test_who_is_gone_is_waited_for_no_more():
    said = Said()
    ends = [Ends(said.of(k), k, 2) for k in range(2)]
    job = job_of(AllReduce(), 2)
    job.open(batches(1)[0])
    mine, theirs = (
        end.batches(loader, lambda: job.job, lambda batch: None)
        for end, loader in zip(ends, [batches(1), batches(1, 2, 3)], strict=True)
    )
    next(mine), next(theirs)
    assert len(next(mine)[0]) == 0
    ends[1].leave()
    assert next(mine, None) is None


def test_the_next_batch_is_announced_before_one_is_given():
    seen: list[float] = []
    ends = Ends(Said().of(0), 0, 1)
    given: Iterator = ends.batches(batches(1, 2, 3), lambda: None, lambda batch: seen.append(batch[0].item()))  # type: ignore[index]
    assert [(batch[0].item(), list(seen)) for batch in given] == [(1, [2]), (2, [2, 3]), (3, [2, 3])]


def test_a_batch_without_examples_is_told_from_others():
    ends = Ends(Said().of(0), 0, 2)
    ends._words.said.words["loader 1 of 1"] = "2"  # type: ignore[attr-defined]
    job = job_of(AllReduce(), 2)
    job.open(batches(1)[0])
    first, second = ends.batches([(torch.ones(3, 1), 7)], lambda: job.job, lambda batch: None)
    assert (len(second[0]), second[1]) == (0, 7)
    assert ends.is_without_examples((second[0], 7))
    assert not ends.is_without_examples(first)


def test_a_loader_that_never_had_a_batch_says_what_to_do():
    said = Said()
    said.words["loader 1 of 1"] = "0+"
    ends, none = Ends(said.of(0), 0, 2), lambda: None
    with pytest.raises(BatchError, match=r"Give distribute\(\.\.\., example=batch\)"):
        next(ends.batches([], none, lambda batch: None))
    ends = Ends(said.of(0), 0, 2)
    ends.know((torch.ones(2, 1),))
    assert len(next(ends.batches([], none, lambda batch: None))[0]) == 0
