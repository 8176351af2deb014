"""Will this advertisement be clicked? Deep Learning Recommendation Model (DLRM) on logs in Criteo's format.

    python examples/clicks.py --one-device                                 plain PyTorch
    syncwright run --trainers 2 --servers 2 examples/clicks.py             two trainers, tables on two servers

Without `--data`, the log is invented (see invented_clicks.py) and kept in out/clicks; `python examples/criteo.py` makes of
the real one what `--data` takes. Syncwright needs these lines, all in `main` and `train`:

    trainer = syncwright.distribute(step, model, optimizer, plan=...)     (and the import)
    parts = OwnParts(files, batch, trainer.trainers, trainer.rank)        instead of   all the files
    for batch in trainer.own(parts):                                      instead of   for batch in parts:
    loss = trainer.step(*batch)                                           instead of   loss = step(model, optimizer, *batch)

A trainer reads files of its own, as logs lie on the disks of many machines; where they all can see one loader of whole
batches, `trainer.shard` cuts those (see flights.py).

The model is that of Naumov et al., "Deep Learning Recommendation Model for Personalization and Recommendation Systems"
(2019): a network for what is counted, a table for each category, the dot products of each two of these vectors, and a
network over the products.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from criteo import CARDINALITIES, CATEGORIES, COUNTS, AllParts, OwnParts, convert, parts_of
from filelock import FileLock
from rich.progress import Progress
from torch import Tensor, nn

LINES, SEED, RECORDS_IN_PART, HELD_OUT = 200_000, 0, 20_000, 2
INVENTED = Path("out/clicks")


def invented(folder: Path = INVENTED) -> Path:
    """The folder with the parts of an invented log: made by the first process that comes, once."""
    import invented_clicks

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            print(f"inventing {LINES:,} lines, into {folder} ...", flush=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as made:
                text = Path(made) / "log.txt"
                invented_clicks.write(text, LINES, SEED)
                convert([text], Path(made) / "parts", RECORDS_IN_PART)
                (Path(made) / "parts").rename(folder)
    return folder


# --------------------------------------------------------------------------------- the model and its step


class FixedTables(nn.Module):
    """A table for each category, of as many rows as are given; an id is taken modulo their number."""

    def __init__(self, rows: Sequence[int], width: int, sparse: bool = True):
        super().__init__()
        self.categories = nn.ModuleList(nn.Embedding(count, width, sparse=sparse) for count in rows)
        for table in self.categories:
            nn.init.normal_(table.weight, std=0.05)  # type: ignore[arg-type]

    def forward(self, ids: Tensor) -> Tensor:
        """(n, categories, width) for ids (n, categories)."""
        return torch.stack(
            [table(ids[:, column] % table.num_embeddings) for column, table in enumerate(self.categories)],  # type: ignore[operator]
            dim=1,
        )


class UnboundedTable(nn.Module):
    """One table, with a row for each value of each category that has been seen, up to `capacity` rows."""

    def __init__(self, categories: int, width: int, capacity: int, seed: int):
        super().__init__()
        from syncwright.nn import HashEmbedding, Normal

        self.values = HashEmbedding(width, capacity=capacity, seed=seed, initial=Normal(0.0, 0.05))
        self.count = categories

    def forward(self, ids: Tensor) -> Tensor:
        """(n, categories, width) for ids (n, categories) below 2**32: the category is what an id has above."""
        return self.values(ids + torch.arange(self.count, device=ids.device) * 2**32)


class Model(nn.Module):
    """DLRM: a logit for each line of the log."""

    def __init__(self, tables: nn.Module, categories: int, width: int, counts: int = COUNTS, hidden: int = 64) -> None:
        super().__init__()
        self.tables = tables
        self.bottom = nn.Sequential(nn.Linear(counts, hidden), nn.ReLU(), nn.Linear(hidden, width), nn.ReLU())
        pairs = (categories + 1) * categories // 2
        self.top = nn.Sequential(nn.Linear(width + pairs, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, counts: Tensor, ids: Tensor) -> Tensor:
        dense = self.bottom(counts)
        vectors = torch.cat([dense.unsqueeze(1), self.tables(ids)], dim=1)
        products = vectors @ vectors.transpose(1, 2)
        one, other = torch.tril_indices(vectors.shape[1], vectors.shape[1], offset=-1, device=ids.device)
        return self.top(torch.cat([dense, products[:, one, other]], dim=1)).squeeze(1)


def make_tables(vocabulary: str, rows: int, capacity: int, width: int, seed: int) -> nn.Module:
    """`vocabulary` is "fixed", with tables of at most `rows` rows, or "unbounded", with at most `capacity` in all."""
    if vocabulary == "unbounded":
        return UnboundedTable(CATEGORIES, width, capacity, seed)
    return FixedTables([min(rows, count) for count in CARDINALITIES], width)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(model.parameters(), lr=0.05)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, counts: Tensor, ids: Tensor, clicked: Tensor) -> Tensor:
    """The whole training step, for one device."""
    optimizer.zero_grad()
    loss = F.binary_cross_entropy_with_logits(model(counts, ids), clicked)
    loss.backward()
    optimizer.step()
    return loss


def score(model: nn.Module, counts: Tensor, ids: Tensor, clicked: Tensor) -> tuple[Tensor, Tensor]:
    """A logit for each line, higher is likelier to be clicked; and whether it was."""
    return model(counts, ids), clicked


# ------------------------------------------------------------------------------------- training and judging


def train(
    trainer: Any,
    batches: OwnParts | AllParts,
    epochs: int = 1,
    limit_steps: int | None = None,
    on_step: Callable[[int, int, Tensor], None] | None = None,
) -> list[float]:
    """Train, and return the loss of every step. `on_step(done, total, loss)` is called after each."""
    total = min(epochs * len(batches), limit_steps or sys.maxsize)
    losses: list[Tensor] = []
    for _ in range(epochs):
        if len(losses) == total:
            break
        for counts, ids, clicked in trainer.own(batches):
            loss = trainer.step(counts, ids, clicked)
            losses.append(loss.detach())
            if on_step is not None:
                on_step(len(losses), total, loss)
            if len(losses) == total:
                break
    return torch.stack(losses).tolist()


def auc(trainer: Any, model: nn.Module, held_out: Sequence[Path], batch: int = 8192) -> float:
    """Area under the ROC curve: how often what was clicked scores above what was not (0.5 is guessing)."""
    from sklearn.metrics import roc_auc_score

    model.eval()
    scores, clicked = trainer.evaluate(score, AllParts(held_out, batch))
    model.train()
    return float(roc_auc_score(clicked.cpu().numpy(), scores.detach().cpu().numpy()))


class OneDevice:
    """The trainer of `--one-device`: plain PyTorch under the names that a Syncwright trainer has."""

    rank = 0

    def __init__(self, step: Callable[..., Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.function, self.model, self.optimizer = step, model, optimizer

    def __enter__(self) -> OneDevice:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def own(self, loader: Iterable[Any]) -> Iterator[Any]:
        return iter(loader)

    def step(self, *batch: Tensor) -> Tensor:
        return self.function(self.model, self.optimizer, *batch)

    def evaluate(self, function: Callable[..., tuple[Tensor, ...]], loader: Iterable[Any]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            given = [function(self.model, *batch) for batch in loader]
        return tuple(torch.cat(tensors) for tensors in zip(*given, strict=True))


def show(bar: Progress) -> Callable[[int, int, Tensor], None]:
    """Progress as a bar on a terminal, else as a line every 100 steps."""
    task = bar.add_task("training", total=None)

    def on_step(done: int, total: int, loss: Tensor) -> None:
        bar.update(task, completed=done, total=total)
        if bar.disable and (done % 100 == 0 or done == total):
            print(f"step {done} of {total}: loss {loss.item():.4f}", flush=True)

    return on_step


class Steps:
    """When each step ended; hands what it is called with on to `show`. Changes with every step."""

    def __init__(self, show: Callable[[int, int, Tensor], None] | None):
        self._show = show
        self._ended: list[float] = []

    def __call__(self, done: int, total: int, loss: Tensor) -> None:
        self._ended.append(time.perf_counter())
        if self._show is not None:
            self._show(done, total, loss)

    def per_second(self) -> float:
        """Of the second half, when nothing is captured or compiled any more; 0 for a single step."""
        half = self._ended[(len(self._ended) - 1) // 2 :]
        return (len(half) - 1) / (half[-1] - half[0]) if len(half) > 1 else 0.0


def run(args: argparse.Namespace, parts: Sequence[Path], one_device: bool, trainers: int) -> dict[str, Any] | None:
    """Trains and judges; the report, on trainer 0. One device reads what `trainers` trainers would."""
    train_on, held_out = parts[: -args.held_out], parts[-args.held_out :]
    torch.manual_seed(args.seed)
    tables = make_tables(args.vocabulary, args.rows, args.capacity, args.width, args.seed)
    model = Model(tables, CATEGORIES, args.width)
    optimizer = make_optimizer(model)
    if one_device:
        trainer: Any = OneDevice(step, model, optimizer)
        batches: OwnParts | AllParts = AllParts(train_on, args.batch, trainers)
    else:
        import syncwright

        trainer = syncwright.distribute(step, model, optimizer, plan=args.plan)
        trainers = trainer.trainers
        batches = OwnParts(train_on, args.batch, trainers, trainer.rank)

    start = time.perf_counter()
    with trainer, Progress(disable=trainer.rank != 0 or not sys.stdout.isatty()) as bar:
        steps = Steps(show(bar) if trainer.rank == 0 else None)
        losses = train(trainer, batches, args.epochs, args.limit_steps, steps)
        seconds = time.perf_counter() - start
        result = auc(trainer, model, held_out)
    if trainer.rank != 0:
        return None
    who = f"one device, in the order of {trainers} trainers" if one_device else f"{trainers} trainers"
    rate = steps.per_second() * trainers
    print(f"{who}: {len(losses)} steps in {seconds:.1f} s, in the second half {rate:.0f} minibatches/s")
    print(f"{who}: AUC on held-out lines {result:.4f}", flush=True)
    report = {"auc": result, "steps": len(losses), "seconds": seconds, "minibatches_per_second": rate}
    return report | {"trainers": trainers, "losses": losses}


def main() -> None:
    options = argparse.ArgumentParser(description="Which advertisements are clicked? DLRM on a log in Criteo's format.")
    options.add_argument("--one-device", action="store_true", help="plain PyTorch, without Syncwright")
    options.add_argument("--trainers", type=int, default=1, help="with --one-device: read as so many trainers do")
    options.add_argument("--data", type=Path, help="a folder of parts; default: an invented log")
    options.add_argument("--held-out", type=int, default=HELD_OUT, help="parts, the last ones, for the evaluation")
    options.add_argument("--vocabulary", choices=("fixed", "unbounded"), default="fixed")
    options.add_argument("--rows", type=int, default=10_000, help="fixed: rows of a table, at most")
    options.add_argument("--capacity", type=int, default=1_000_000, help="unbounded: rows in all, at most")
    options.add_argument("--width", type=int, default=16, help="numbers in a row")
    options.add_argument("--plan", default=str(Path(__file__).with_suffix(".yaml")), help="a name or a YAML file")
    options.add_argument("--epochs", type=int, default=1)
    options.add_argument("--batch", type=int, default=512, help="lines in a batch, over all trainers")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--limit-steps", type=int, help="stop after this many steps")
    options.add_argument(
        "--compare", action=argparse.BooleanOptionalAction, help="also train on one device; default: if invented"
    )
    options.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    args = options.parse_args()

    torch.sparse.check_sparse_tensor_invariants.disable()  # torch's Adagrad makes sparse tensors, and asks to be told
    parts = parts_of(args.data or invented())
    report = run(args, parts, args.one_device, args.trainers)
    if report is None:
        return
    if not args.one_device and (args.compare or (args.compare is None and args.data is None)):
        alone = run(args, parts, True, report["trainers"])
        assert alone is not None, "one device has a report"
        report["one_device"] = alone
        apart = max(abs(a - b) for a, b in zip(report["losses"], alone["losses"], strict=True))
        print(f"largest difference of a step's loss: {apart:.1e}")
    if args.json:
        args.json.write_text(json.dumps({"example": "clicks"} | report, indent=1))


if __name__ == "__main__":
    main()
