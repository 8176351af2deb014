"""The job of test_example_jobs.py: `python example_job.py FOLDER`, once per role.

One step trains every variant: a model of the examples, with tables of its own and one optimizer. The variants share nothing but
the step, so each can be compared with one device by itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import clicks
import flights
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

import syncwright
from syncwright import AllReduce, ParameterServer, Rules
from syncwright.plan.sync import Sync
from syncwright.runtime.deadlines import Deadlines
from syncwright.runtime.sharding import part_of

STEPS = 50
OPTIMIZERS: Mapping[str, Callable[[list[nn.Parameter], list[nn.Parameter]], list[Optimizer]]] = {
    "SGD": lambda tables, dense: [torch.optim.SGD(tables + dense, lr=0.1)],
    "momentum": lambda tables, dense: [torch.optim.SGD(tables + dense, lr=0.05, momentum=0.9)],
    "Adagrad": lambda tables, dense: [torch.optim.Adagrad(tables + dense, lr=0.05)],
    "Adam": lambda tables, dense: [torch.optim.Adam(tables + dense, lr=0.005)],
    "SparseAdam": lambda tables, dense: [
        torch.optim.SparseAdam(tables, lr=0.005),
        torch.optim.Adam(dense, lr=0.005),
    ],
    "lazy": lambda tables, dense: [torch.optim.Adam(tables + dense, lr=0.005, eps=TINY)],
    "lazy reference": lambda tables, dense: [
        torch.optim.SparseAdam(tables, lr=0.005, eps=TINY),
        torch.optim.Adam(dense, lr=0.005, eps=TINY),
    ],
}
TINY = 1e-30
"""Adam adds eps after it corrects the second moment's bias, SparseAdam before: where eps is nothing they are the same."""

SPARSE = {
    "flights": ("SparseAdam", "lazy reference"),
    "clicks": ("SGD", "Adagrad", "SparseAdam", "lazy reference"),
}
"""Of which optimizers the tables have sparse gradients in the user's own step."""

EXACT = ("SGD", "momentum", "Adagrad", "Adam")


def of(model: str, *optimizers: str) -> tuple[tuple[str, str], ...]:
    """Variants of one model."""
    return tuple((model, name) for name in optimizers)


VARIANTS = of("flights", *EXACT, "SparseAdam", "lazy") + of("clicks", *EXACT, "SparseAdam", "lazy")

Batch = tuple[Tensor, ...]
"""`ids`, `dense` and `late` of flights, then `counts`, `ids` and `clicked` of clicks."""


@dataclass(frozen=True, slots=True)
class Data:
    """What both models are trained on, and how large their tables are."""

    train: Batch
    held_out: Batch
    flights_rows: dict[str, int]
    clicks_rows: tuple[int, ...]

    def batches(self, size: int) -> list[Batch]:
        """The global batches of `STEPS` steps; the last is one example short."""
        found = [tuple(t[at * size : (at + 1) * size] for t in self.train) for at in range(STEPS)]
        return [*found[:-1], tuple(t[:-1] for t in found[-1])]


_ALL_REDUCE, _SERVERS = AllReduce(), ParameterServer()


@dataclass(frozen=True, slots=True)
class Setting:
    """One job.

    dense, tables  how dense layers and tables are shared
    own            whether trainers are given their own parts, or cut global batches
    """

    trainers: int
    servers: int = 2
    dense: Sync = _ALL_REDUCE
    tables: ParameterServer = _SERVERS
    own: bool = True
    variants: tuple[tuple[str, str], ...] = VARIANTS

    def rules(self) -> Rules:
        lazy = replace(self.tables, lazy=True)
        of_tables = {
            f"{model}.{name}.{TABLES[model]}.*": lazy if name == "lazy" else self.tables
            for model, name in self.variants
        }
        return Rules.of(self.dense, of_tables)


TABLES = {"flights": "embeddings", "clicks": "tables"}


class Variants(nn.Module):
    """Both examples' models, once for each optimizer, with the same first values every time."""

    def __init__(self, data: Data, variants: Sequence[tuple[str, str]]):
        super().__init__()
        self.variants = tuple(variants)
        for model in SPARSE:
            chosen = {name: one_model(data, model, name) for kind, name in variants if kind == model}
            if chosen:
                self.add_module(model, nn.ModuleDict(chosen))

    def scores(self, batch: Batch) -> Iterator[Tensor]:
        for model, name in self.variants:
            yield self.get_submodule(f"{model}.{name}")(*inputs(model, batch))


def one_model(data: Data, model: str, optimizer: str) -> nn.Module:
    torch.manual_seed(7)
    if model == "flights":
        built: nn.Module = flights.Model(data.flights_rows, data.train[1].shape[1], width=4, hidden=16)
        for table in built.embeddings.values():  # type: ignore[union-attr, operator]
            table.sparse = optimizer in SPARSE[model]
        return built
    tables = clicks.FixedTables(data.clicks_rows, 4, optimizer in SPARSE[model])
    return clicks.Model(tables, len(data.clicks_rows), 4, hidden=16)


def inputs(model: str, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return (batch[0], batch[1]) if model == "flights" else (batch[3], batch[4])


def label(model: str, batch: Sequence[Tensor]) -> Tensor:
    return batch[2] if model == "flights" else batch[5]


def optimizers_of(model: nn.Module, kind: str, name: str) -> list[Optimizer]:
    """Those of one variant, whose model this is."""
    tables = list(model.get_submodule(TABLES[kind]).parameters())
    known = set(map(id, tables))
    return OPTIMIZERS[name](tables, [p for p in model.parameters() if id(p) not in known])


def build(data: Data, variants: Sequence[tuple[str, str]]) -> tuple[Variants, tuple[Optimizer, ...]]:
    model = Variants(data, variants)
    found = [optimizers_of(model.get_submodule(f"{kind}.{name}"), kind, name) for kind, name in variants]
    return model, tuple(optimizer for some in found for optimizer in some)


def step(model: Variants, optimizers: Sequence[Optimizer], *batch: Tensor) -> list[Tensor]:
    """Every variant's loss."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    labels = [label(kind, batch) for kind, _ in model.variants]
    losses = [F.binary_cross_entropy_with_logits(s, y) for s, y in zip(model.scores(batch), labels, strict=True)]
    torch.stack(losses).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    return losses


def score(model: Variants, *batch: Tensor) -> list[Tensor]:
    return list(model.scores(batch))


def main(folder: Path) -> None:
    data, setting, size = torch.load(folder / "job.pt", weights_only=False)
    model, optimizers = build(data, setting.variants)
    how: dict = {"plan": setting.rules(), "compile": False, "deadlines": Deadlines(join=100, wait=60, linger=1)}
    with syncwright.distribute(step, model, optimizers, **how) as trainer:
        global_batches = data.batches(size)
        if setting.own:
            given = trainer.own(part_of(batch, setting.trainers, trainer.rank) for batch in global_batches)
        else:
            given = trainer.shard(global_batches)
        losses, asked = [], []
        for batch in given:
            if len(losses) == 1:
                asked = asking(trainer)
            losses.append(trainer.step(*batch))
        held_out = [tuple(t[at : at + 100] for t in data.held_out) for at in range(0, len(data.held_out[0]), 100)]
        scores = trainer.evaluate(score, held_out)
        state = trainer.state_dict()
        plan = trainer.plan.to_yaml()
    report = {"losses": losses, "scores": scores, "state": state, "plan": plan, "asked": asked}
    torch.save(report, folder / f"{trainer.rank}.pt")


def asking(trainer: syncwright.Trainer) -> list[tuple[str, int]]:
    """Fills with the table of each request for rows of a later step, each of those that are joined, and by how many steps it is
    later."""
    seen: list[tuple[str, int]] = []
    client = trainer._session.replicas[0].client
    ask_rows = client.ask_rows
    parts: dict[str, list[str]] = {}
    for name, part in client.job.below.items():
        parts.setdefault(str(part.whole), []).append(name)

    def noted(channel: str, ids: Tensor, step: int) -> object:
        seen.extend((name, step - trainer._session.step_count) for name in parts.get(channel, [channel]))
        return ask_rows(channel, ids, step)

    client.ask_rows = noted  # type: ignore[method-assign, assignment]
    return seen


if __name__ == "__main__":
    main(Path(sys.argv[1]))
