"""A cover of the matrix (`make matrix` runs all of it): every two choices of two factors meet in some case."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from syncwright import capture
from tests import zoo
from tests.equivalence import (
    DTYPES,
    IDLE,
    PARTS,
    PLANS,
    RAGGED,
    Case,
    Family,
    Laboratory,
    Outcome,
    References,
    judge,
    plan_for,
)
from tests.matrix import SERVERS
from tests.pairwise import pairs_of, pairwise_cover

FACTORS = (
    tuple(zoo.OPTIMIZERS),
    tuple(zoo.MODELS),
    (*PARTS.values(), RAGGED, (3, 2), IDLE, (0, 1, 2)),
    tuple(PLANS),
    SERVERS,
    tuple(DTYPES),
    (False, True),
    (False, True),
)


def _case(optimizer, model, parts, plan, servers, dtype, clip, schedule) -> Case:
    return Case(Family(model, optimizer, dtype, clip), plan, parts, servers, schedule)


ROWS = pairwise_cover([len(factor) for factor in FACTORS])
COVER = [_case(*(factor[choice] for factor, choice in zip(FACTORS, row, strict=True))) for row in ROWS]


@pytest.mark.parametrize("case", COVER, ids=lambda case: case.name)
def test_equals_one_device(case: Case) -> None:
    verdict = Laboratory(case.family).judge(case)
    assert not verdict.failure, f"{verdict.failure}\n  python -m tests.matrix --only {case.name}"


def test_every_two_choices_meet() -> None:
    met = {pair for row in ROWS for pair in pairs_of(row)}
    assert len(met) == sum(len(a) * len(b) for a, b in combinations(FACTORS, 2))
    assert len(set(COVER)) == len(COVER)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=5))
def test_cover_is_complete_and_not_longer_than_all_choices(sizes: list[int]) -> None:
    rows = pairwise_cover(sizes)
    covered = {pair for row in rows for pair in pairs_of(row)}
    wanted = {
        (i, a, j, b) for i, j in combinations(range(len(sizes)), 2) for a in range(sizes[i]) for b in range(sizes[j])
    }
    assert covered == wanted
    assert len(rows) <= torch.tensor(sizes).prod()


@pytest.mark.parametrize("model", zoo.MODELS)
def test_a_variable_of_every_model_is_cut(model: str) -> None:
    """Cut into pieces that lie on two servers, each with an update program of its own."""
    network, optimizer = zoo.make_model(model, "Adam", torch.float32)
    (batch,) = zoo.make_batches(model, torch.float32, 4, 1)
    program = capture(zoo.make_step(model, False), network, optimizer, *batch)
    plan = plan_for(program, "parameter_server_partitioned", 2, 2)
    cut = [s for s in plan.sharings if len(s.sizes) > 1]
    assert cut, f"no variable of {model} is cut"
    assert all(set(s.owners) == {0, 1} for s in cut)


def test_judgement_fails_what_is_wrong() -> None:
    """A value off by more than the tolerance, and one that is off by a rounding where bit-equality is due."""
    case = COVER[0]
    right = Outcome({"w": torch.tensor([1.0, 2.0])}, ())
    off = Outcome({"w": torch.tensor([1.0, 2.001])}, ())
    rounded = Outcome({"w": torch.nextafter(right.values["w"], torch.tensor(9.0))}, ())
    asked, rounding = References(right, right, right, {"w": 0.0}), References(right, right, None, {"w": 0.0})
    assert not judge(case, right, asked).failure
    assert judge(case, off, rounding).failure
    assert judge(case, rounded, asked).failure
    assert not judge(case, rounded, rounding).failure
