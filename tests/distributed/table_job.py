"""A table of any ids on two servers in processes: what `test_tables` starts. Two epochs, with all that can be done beside."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import syncwright
from syncwright import AllReduce, ParameterServer, Rules
from syncwright.nn import CountFilter, HashEmbedding, ScoreDecay
from syncwright.optim import RowWiseAdagrad

EXAMPLES, BATCH = 23, 6
IDS = torch.tensor([-(2**63), -1, 0, 5, 2**40, 2**63 - 1, 77, -78, 12345, 10**15])


def build() -> tuple[nn.ModuleDict, torch.optim.Optimizer]:
    torch.manual_seed(0)
    options = {"admission": CountFilter(2), "eviction": ScoreDecay(threshold=0.05), "seed": 3}
    model = nn.ModuleDict({"table": HashEmbedding(4, capacity=64, **options), "head": nn.Linear(4, 1)})
    return model, RowWiseAdagrad(model.parameters(), lr=0.1)


def plan(mode: str) -> Rules:
    return Rules(AllReduce(), (("table.*", ParameterServer(mode=mode)),))


def step(model, optimizer, ids, y):
    optimizer.zero_grad()
    loss = (model["head"](model["table"](ids).sum(1)) - y).square().mean()
    loss.backward()
    optimizer.step()
    return loss


def predict(model, ids, y):
    return model["head"](model["table"](ids).sum(1))


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    ids = IDS[torch.randint(len(IDS), (EXAMPLES, 3), generator=generator)]
    return TensorDataset(ids, torch.randn(EXAMPLES, 1, generator=generator))


def shown(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each id of a part one show; of odd ones a click."""
    flat = ids.flatten()
    return flat, torch.ones(flat.shape), (flat % 2).float()


def main(folder: Path, mode: str) -> None:
    model, optimizer = build()
    report: dict[str, object] = {}
    given = {"plan": plan(mode), "compile": False}
    with syncwright.distribute(step, model, optimizer, **given) as trainer:  # type: ignore[arg-type]
        table = model["table"]
        losses, marks = [], []
        for _ in range(2):
            for ids, y in trainer.shard(DataLoader(data(), BATCH)):
                losses.append(float(trainer.step(ids, y)))  # type: ignore[arg-type]
            trainer.observe(table, *shown(ids))
            saved = trainer.export(table, since=marks[-1] if marks else None)
            marks.append(saved.mark)
            report[f"export {len(marks)}"] = saved.to_dict()
        report["predictions"] = trainer.evaluate(predict, DataLoader(data(), 7))
        report["removed"] = trainer.shrink(table)
    torch.save(report | {"losses": losses, "end": model.state_dict()}, folder / f"{trainer.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
