"""Compressed gradients: exact numbers, under replicas and parts, and what is kept of what is not sent."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import syncwright
from syncwright import AllReduce, Rules, Shard, ops
from syncwright.errors import PlanError
from syncwright.plan import Cast, ErrorFeedback, Int8, PowerSGD, TopK
from syncwright.runtime.loopback import Loopback

BOTH = [AllReduce, lambda **given: Shard(1, **given), lambda **given: Shard(3, **given)]
NAMES = ["all_reduce", "stage 1", "stage 3"]


class Number(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))


def products(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
    """The gradient is x."""
    optimizer.zero_grad()
    loss = (model.w * x).sum(1).mean()
    loss.backward()
    optimizer.step()
    return loss


def job_of(rules: Rules, trainers: int = 2) -> Loopback:
    model = Number()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return syncwright.loopback(products, model, optimizer, plan=rules, trainers=trainers)


def moved(job: Loopback, gradient: float, trainers: int = 2) -> float:
    """By how much a step moves an element of which every trainer has this gradient."""
    job.sync()
    before = float(job.model.w[1])
    job.step([(torch.full((1, 3), gradient),)] * trainers)
    job.sync()
    return before - float(job.model.w[1])


@pytest.mark.parametrize("sharing", BOTH, ids=NAMES)
def test_error_feedback_sends_later_what_it_left_out(sharing):
    """1 + 2**-12 in half precision is 1, four times: what is left out adds up until it counts."""
    job = job_of(Rules(sharing(compress=ErrorFeedback(Cast("float16")))))
    found = [moved(job, 1 + 2**-12) for _ in range(4)]
    assert found == [1.0, 1.0, 1 + 2**-10, 1.0]
    assert [float(r.values["w.residual"][1]) for r in job.replicas] == [0.0, 0.0]  # type: ignore[index]


@pytest.mark.parametrize("sharing", BOTH, ids=NAMES)
def test_a_cast_rounds_and_keeps_nothing(sharing):
    job = job_of(Rules(sharing(compress=Cast("float16"))))
    assert [moved(job, 1 + 2**-12) for _ in range(2)] == [1.0, 1.0]
    assert "w.residual" not in job.replicas[0].values


@pytest.mark.parametrize("sharing", BOTH, ids=NAMES)
@pytest.mark.parametrize("trainers", [2, 4])
def test_a_mean_does_not_overflow_on_the_way(sharing, trainers):
    """40000 + 40000 is more than half precision holds."""
    assert moved(job_of(Rules(sharing(compress=Cast("float16"))), trainers), 40000.0, trainers) == 40000.0


@pytest.mark.parametrize(("sharing", "op"), [(AllReduce, ops.all_reduce), (Shard, ops.reduce_scatter)])
def test_half_the_bytes_travel(sharing, op):
    job = job_of(Rules(sharing(compress=Cast("bfloat16"))))
    moved(job, 1.0)
    sent = [node.args[0] for node in job.job.trainer["step"].graph.find_nodes(op="call_function", target=op)]  # type: ignore[union-attr]
    values = [each[0] if isinstance(each, list | tuple) else each for each in sent]
    assert sum(v.meta["val"].dtype is torch.bfloat16 for v in values) == 1


def test_a_trainer_without_examples_keeps_what_it_has_not_sent():
    job = job_of(Rules(AllReduce(compress=ErrorFeedback(Cast("float16")))))
    moved(job, 1 + 2**-12)
    kept = [r.values["w.residual"].clone() for r in job.replicas]  # type: ignore[union-attr]
    assert all(each[0] == 2**-13 for each in kept)
    job.step([(torch.ones(1, 3),), (torch.ones(0, 3),)])
    assert torch.equal(job.replicas[1].values["w.residual"], kept[1])  # type: ignore[arg-type]


def test_compression_is_written_and_read():
    rules = Rules(AllReduce(compress=ErrorFeedback(Cast("float16"))))
    assert rules.to_yaml() == "default: {all_reduce: {compress: {error_feedback: {cast: float16}}}}\n"
    plan = job_of(rules)
    moved(plan, 1.0)
    assert (
        "all_reduce: {bucket_mb: 25.0, reduce: mean, compress: {error_feedback: {cast: float16}}}"
        in plan.job.plan.to_yaml()
    )  # type: ignore[union-attr]


def test_what_is_no_compression_is_refused(tmp_path):
    with pytest.raises(PlanError, match=r"Cast\.dtype: found 'float64'"):
        Cast("float64")  # type: ignore[arg-type]
    path = tmp_path / "rules.yaml"
    path.write_text("default: {all_reduce: {compress: {casts: float16}}}\n", encoding="utf-8")
    with pytest.raises(
        PlanError,
        match=r"found the key 'casts', expected one of cast, error_feedback, power_sgd, top_k, int8. Did you mean 'cast'",
    ):
        Rules.from_yaml(path)
    path.write_text("default: {all_reduce: {compress: null}}\n", encoding="utf-8")
    assert Rules.from_yaml(path) == Rules(AllReduce(), source=str(path))


class Matrix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(6, 9), nn.Linear(9, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = ((model(x) - y) ** 2).mean()
    loss.backward()
    optimizer.step()
    return loss


def fitted(rules: Rules, examples: int, steps: int, trainers: int = 2) -> tuple[Loopback, list[float]]:
    model, generator = Matrix(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    job = syncwright.loopback(fit, model, optimizer, plan=rules, trainers=trainers)
    x, y = torch.randn(examples, 6, generator=generator), torch.randn(examples, 5, generator=generator)
    parts = list(zip(x.chunk(trainers), y.chunk(trainers), strict=True))
    return job, [float(job.step(parts)) for _ in range(steps)]  # type: ignore[arg-type]


def test_a_gradient_of_a_low_rank_is_sent_as_it_is():
    """Two examples make gradients of rank two: two columns hold them, and nothing is left out."""
    job, losses = fitted(Rules(AllReduce(compress=PowerSGD(2))), 2, 5)
    _, expected = fitted(Rules(AllReduce()), 2, 5)
    assert losses == pytest.approx(expected, rel=1e-4)
    left = [float(r.values[f"{n}.weight.residual"].abs().max()) for r in job.replicas for n in ("first", "second")]  # type: ignore[union-attr]
    assert max(left) < 1e-5


@pytest.mark.parametrize("trainers", [2, 3])
def test_what_factors_leave_out_is_not_lost(trainers):
    """Of each step what all trainers have had to send is what they have applied and what they keep: summed up, the moves and what
    is left are the gradients'."""
    job, losses = fitted(Rules(AllReduce(compress=PowerSGD(1))), 6, 60, trainers)
    _, expected = fitted(Rules(AllReduce()), 6, 60, trainers)
    assert losses[-1] == pytest.approx(expected[-1], rel=0.2)
    assert losses[-1] < 0.7 * losses[0]
    factors = [r.values["first.weight.factor"] for r in job.replicas]
    assert all(torch.equal(factors[0], each) for each in factors[1:])  # type: ignore[arg-type]
    left = [r.values["first.weight.residual"] for r in job.replicas]
    assert not torch.equal(left[0], left[1])  # type: ignore[arg-type]


def test_factors_travel_together_and_are_thin():
    job, _ = fitted(Rules(AllReduce(compress=PowerSGD(1))), 4, 1)
    sent = job.job.trainer["step"].graph.find_nodes(op="call_function", target=ops.all_reduce)  # type: ignore[union-attr]
    assert [node.args[0].meta["val"].numel() for node in sent] == [(9 + 5) + (9 + 5) + 2, 6 + 9]


def test_until_a_step_gradients_travel_as_they_are():
    _, expected = fitted(Rules(AllReduce()), 4, 4)
    _, losses = fitted(Rules(AllReduce(compress=PowerSGD(1, start_step=2))), 4, 4)
    assert losses[:3] == expected[:3]
    assert losses[3] != expected[3]


def test_factors_of_parts_are_refused():
    with pytest.raises(PlanError, match=r"found compress: power_sgd.*all_reduce"):
        Shard(1, compress=PowerSGD(2))


@pytest.mark.parametrize(
    ("text", "compress"),
    [
        ("{cast: bfloat16}", Cast("bfloat16")),
        ("{error_feedback: {cast: float16}}", ErrorFeedback(Cast("float16"))),
        ("{error_feedback: {of: {cast: float16}}}", ErrorFeedback(Cast("float16"))),
        ("{power_sgd: {rank: 4}}", PowerSGD(4)),
        ("{top_k: {ratio: 0.01}}", TopK(0.01)),
        ("{top_k: {ratio: 0.001, momentum: 0.9, warmup_steps: 1000}}", TopK(0.001, 0.9, 1000)),
        ("{error_feedback: {top_k: {ratio: 0.01}}}", ErrorFeedback(TopK(0.01))),
        ("int8", Int8()),
        ("{int8: 256}", Int8(256)),
        ("{error_feedback: int8}", ErrorFeedback(Int8())),
    ],
)
def test_every_compression_can_be_written_by_hand(tmp_path, text, compress):
    path = tmp_path / "rules.yaml"
    path.write_text(f"default: {{all_reduce: {{compress: {text}}}}}\n", encoding="utf-8")
    assert Rules.from_yaml(path).default == AllReduce(compress=compress)
    again = tmp_path / "again.yaml"
    again.write_text(Rules(AllReduce(compress=compress)).to_yaml(), encoding="utf-8")
    assert Rules.from_yaml(again).default == AllReduce(compress=compress)
