"""Gradients of which the largest elements travel, or whole numbers of 8 bits: exact numbers, what is kept, and equality."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import syncwright
from syncwright import AllReduce, LocalSteps, Rules, Shard, ops
from syncwright.errors import LoweringError, PlanError
from syncwright.plan import Cast, ErrorFeedback, Int8, TopK
from syncwright.plan.compression import Compression
from syncwright.planning import make_plan
from syncwright.runtime.inductor import is_available, obstacle
from syncwright.runtime.loopback import Loopback
from syncwright.runtime.session import Training

FIRST = [4.0, 1.0, -3.0, 2.0]
SHARE = 0.5
"""What each of two trainers' gradients is multiplied by on its way to the mean."""


class Numbers(nn.Module):
    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(count))


def products(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
    """The gradient is the mean of x; the step is the gradient."""
    optimizer.zero_grad()
    loss = (model.w * x).sum(1).mean()
    loss.backward()
    optimizer.step()
    return loss


def clipped(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
    """The same, of the gradient clipped to a norm of 1."""
    optimizer.zero_grad()
    loss = (model.w * x).sum(1).mean()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss


def job_of(
    by: Compression, trainers: int = 2, count: int = 4, step: Callable = products, momentum: float = 0
) -> Loopback:
    model = Numbers(count)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=momentum)
    plan = Rules(AllReduce(compress=by))
    return syncwright.loopback(step, model, optimizer, plan=plan, trainers=trainers, check_replicas=True)


def moved(job: Loopback, *gradients: Sequence[float]) -> list[float]:
    """By how much a step lowers each number, of which the trainers have these gradients."""
    job.sync()
    before = job.model.w.detach().clone()
    job.step([(torch.tensor([each]),) for each in gradients])
    job.sync()
    return (before - job.model.w.detach()).tolist()


def kept(job: Loopback, name: str = "w.residual") -> list[list[float]]:
    """What each trainer has kept of its gradients, as it has computed them."""
    return [(r.values[name] / SHARE).tolist() for r in job.replicas]  # type: ignore[operator, union-attr]


def test_the_largest_elements_are_sent_and_the_others_later():
    job = job_of(TopK(0.5))
    assert moved(job, FIRST, FIRST) == [4, 0, -3, 0]
    assert kept(job) == [[0, 1, 0, 2]] * 2
    assert moved(job, [1, 1, 0.5, 1], [1, 1, 0.5, 1]) == [0, 2, 0, 3]
    assert kept(job) == [[1, 0, 0.5, 0]] * 2


def test_trainers_send_different_elements():
    """Where only one sends, the mean is half of what it has; the other's part of it comes later."""
    job = job_of(TopK(0.25))
    assert moved(job, [4, 1, 0, 0], [1, -2, 0, 0]) == [2, -1, 0, 0]
    assert kept(job) == [[0, 1, 0, 0], [1, 0, 0, 0]]
    assert moved(job, [0, 0, 0, 0], [0, 0, 0, 0]) == [0.5, 0.5, 0, 0]
    assert kept(job) == [[0, 0, 0, 0]] * 2


def test_of_a_mean_over_examples_a_trainers_part_weighs_what_it_has():
    """Three examples and one: 3/4 and 1/4 of the mean."""
    job = job_of(TopK(0.25))
    job.step([(torch.tensor([[8.0, 0, 0, 0]] * 3),), (torch.tensor([[0.0, 4, 0, 0]]),)])
    job.sync()
    assert job.model.w.tolist() == [-6, -1, 0, 0]


def test_a_trainer_without_examples_sends_nothing_and_keeps_what_it_has():
    job = job_of(TopK(0.25))
    moved(job, FIRST, FIRST)
    job.step([(torch.ones(1, 4),), (torch.ones(0, 4),)])
    assert kept(job)[1] == [0, 1, -3, 2]


def test_of_equal_elements_the_first_are_sent():
    job = job_of(TopK(0.5))
    assert moved(job, [1, -1, 1, -1], [-1, 1, -1, 1]) == [0, 0, 0, 0]
    assert kept(job) == [[0, 0, 1, -1], [0, 0, -1, 1]]


@given(st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, -7.0, float("inf"), 1e-30]), min_size=1), st.data())
def test_the_largest_are_those_that_a_stable_sort_puts_first(numbers, data):
    count = data.draw(st.integers(1, len(numbers)))
    order = sorted(range(len(numbers)), key=lambda place: -abs(numbers[place]))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        found = ops.largest(torch.tensor(numbers, dtype=dtype), count)
        assert found.dtype is torch.int32
        assert found.tolist() == sorted(order[:count])


def test_what_is_no_number_is_sent_first():
    """So that it is seen."""
    assert ops.largest(torch.tensor([1.0, float("inf"), float("nan"), 2.0]), 1).tolist() == [2]


@pytest.mark.parametrize("by", [TopK(0.1), TopK(0.3), ErrorFeedback(TopK(0.1))])
def test_what_is_sent_and_what_is_kept_are_all_gradients(by):
    """To the bit, of whole numbers."""
    generator, job, total = torch.Generator().manual_seed(5), job_of(by, count=20), torch.zeros(20)
    for _ in range(12):
        given_to = torch.randint(-50, 50, (2, 20), generator=generator).float()
        moved(job, *given_to.tolist())
        total += given_to.mean(0)
    left = sum(r.values["w.residual"] for r in job.replicas)  # type: ignore[union-attr]
    assert torch.equal(-job.model.w.detach() + left, total)  # type: ignore[operator]
    assert bool(left.any())  # type: ignore[union-attr]


@pytest.mark.parametrize("by", [TopK(0.5, momentum=0.5), ErrorFeedback(TopK(0.5, momentum=0.5))])
def test_velocity_is_summed_before_the_largest_are_chosen(by):
    """u = u / 2 + g, v += u; both begin anew where v has been sent."""
    job = job_of(by)
    assert moved(job, FIRST, FIRST) == [4, 0, -3, 0]
    assert kept(job, "w.velocity") == kept(job) == [[0, 1, 0, 2]] * 2
    zeros = [0.0] * 4
    assert moved(job, [3, 0, 0, 0], zeros) == [1.5, 0.75, 0, 3]
    assert kept(job, "w.velocity") == [[0, 0.5, 0, 0], zeros]
    assert kept(job) == [[0, 1.5, 0, 0], zeros]
    assert moved(job, zeros, zeros) == [0, 0.875, 0, 0]


def test_momentum_counts_once():
    with pytest.raises(
        LoweringError, match=r"'w' is compressed by top_k with momentum: 0.5.*keeps 'w.momentum_buffer'"
    ):
        moved(job_of(TopK(0.5, momentum=0.5), momentum=0.9), FIRST, FIRST)
    assert moved(job_of(TopK(0.5), momentum=0.9), FIRST, FIRST) == [4, 0, -3, 0]


@pytest.mark.parametrize("by", [TopK(0.5), Int8(), ErrorFeedback(Int8())])
def test_what_is_no_row_of_numbers_is_refused_and_what_is_empty_is_left_alone(by):
    class Odd(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.w, self.none = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(0, 3))
            self.odd = nn.Parameter(torch.ones(2, dtype=dtype))

    def squares(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = ((model.w * model.odd * x).abs() ** 2).mean() + model.none.sum()
        loss.backward()
        optimizer.step()
        return loss

    def run(dtype: torch.dtype) -> Loopback:
        model = Odd(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        job = syncwright.loopback(squares, model, optimizer, plan=Rules(AllReduce(compress=by)), trainers=2)
        job.step([(torch.ones(1, 2),)] * 2)
        return job

    with pytest.raises(
        LoweringError, match=r"'odd' is compressed by (top_k|int8) and has 2 elements of torch.complex64"
    ):
        run(torch.complex64)
    assert "none.residual" not in run(torch.float64).replicas[0].values


def test_a_warm_up_sends_more_at_first():
    """A quarter, a sixteenth, a sixty-fourth, and then what is asked for."""
    by = TopK(0.01, warmup_steps=6)
    assert by.stretches == {0: 0.25, 2: 0.0625, 4: 0.015625, 6: 0.01}
    assert TopK(0.01).stretches == {0: 0.01}
    assert TopK(0.1, warmup_steps=1).stretches == {0: 0.25, 1: 0.1}
    job, ones = job_of(by, count=256), [1.0] * 256
    assert [sum(moved(job, ones, ones)[:64]) for _ in range(1)] == [64]
    counts = [int((torch.tensor(moved(job, ones, ones)) != 0).sum()) for _ in range(7)]
    assert counts == [64, 16, 16, 4, 4, 3, 3]


class Layers(nn.Module):
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
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    return loss


def fitted(
    sync: AllReduce, trainers: int = 2, steps: int = 5, compile: bool = False, examples: int = 8, lr: float = 0.01
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """What it ends with, and the losses."""
    model, generator = Layers(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    training = Training(
        *(fit, model, optimizer, None, None),
        lambda program: make_plan(Rules(sync), program, trainers, 0),
        compile=compile,
    )
    job = Loopback(training, trainers)
    x, y = torch.randn(examples, 6, generator=generator), torch.randn(examples, 5, generator=generator)
    parts = list(zip(x.tensor_split(trainers), y.tensor_split(trainers), strict=True))
    losses = [float(job.step(parts)) for _ in range(steps)]  # type: ignore[arg-type]
    return job.state_dict()["model"], losses  # type: ignore[return-value]


@pytest.mark.parametrize("bucket_mb", [25.0, 0.0002, 0.0])
@pytest.mark.parametrize(("trainers", "examples"), [(2, 8), (4, 8), (2, 7), (3, 2)])
def test_all_elements_are_the_whole_gradient(trainers, examples, bucket_mb):
    """Clipped by the norm of the mean, in one bucket and in several, with parts of any sizes."""
    found, losses = fitted(AllReduce(bucket_mb, compress=TopK(1.0)), trainers, examples=examples)
    expected, expected_losses = fitted(AllReduce(bucket_mb), trainers, examples=examples)
    assert losses == pytest.approx(expected_losses, rel=1e-6)
    for name, value in expected.items():
        assert float((found[name] - value).abs().max()) <= 1e-5 * float(value.abs().max()), name


def test_the_norm_is_of_what_all_have_sent():
    """3 is sent of [3, 2] and 4 of [2, 4]: the mean is [1.5, 2], its norm 2.5."""
    found = moved(job_of(TopK(0.5), count=2, step=clipped), [3, 2], [2, 4])
    assert found == pytest.approx([0.6, 0.8], abs=1e-6)


@pytest.mark.parametrize("bucket_mb", [25.0, 0.0002])
def test_what_travels_is_joined_into_buckets(bucket_mb):
    model = Layers()
    job = syncwright.loopback(
        fit,
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        plan=Rules(AllReduce(bucket_mb, compress=TopK(0.34))),
        trainers=2,
    )
    job.step([(torch.randn(4, 6), torch.randn(4, 5))] * 2)
    starts = job.job.trainer["step"].graph.find_nodes(op="call_function", target=ops.gather_parts)  # type: ignore[union-attr]
    sizes = [[source.meta["val"].numel() for source in start.args[0]] for start in starts]
    whole = [2, 2, 15, 15, 3, 3, 18, 18]
    assert sizes == ([whole] if bucket_mb > 1 else [whole[:6], whole[6:]])


@pytest.mark.skipif(not is_available(), reason=str(obstacle()))
@pytest.mark.parametrize("by", [TopK(0.2, warmup_steps=2), Int8(), ErrorFeedback(Int8(8))])
def test_compiled_is_as_interpreted(by):
    found, losses = fitted(AllReduce(compress=by), 2, 4, compile=True)
    expected, expected_losses = fitted(AllReduce(compress=by), 2, 4)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    for name, value in expected.items():
        assert float((found[name] - value).abs().max()) <= 1e-5 * float(value.abs().max()), name


@pytest.mark.parametrize("by", [TopK(0.1), ErrorFeedback(Int8()), Int8(16)])
def test_what_is_left_out_is_made_up_for(by):
    _, losses = fitted(AllReduce(compress=by), 2, 80, lr=0.03)
    _, expected = fitted(AllReduce(), 2, 80, lr=0.03)
    assert losses[-1] < 0.25 * losses[0]
    assert losses[-1] == pytest.approx(expected[-1], abs=0.1 * losses[0])


def test_eight_bits_are_127_steps_of_the_largest_in_each_block():
    job = job_of(Int8(2))
    assert moved(job, [127, -63.6, 0.0, 254], [127, -63.6, 0.0, 254]) == [127, -64, 0, 254]
    assert moved(job, [127, 0.4, 2, 254], [127, 0.4, 2, 254]) == [127, 0, 2, 254]
    assert job.replicas[0].values.keys() == {"w"}


def test_a_block_that_is_not_full():
    assert moved(job_of(Int8(3), count=4), [127, 1, 2, 0.5], [127, 1, 2, 0.5]) == pytest.approx(
        [127, 1, 2, 0.5], abs=1e-6
    )


def test_what_rounding_leaves_out_is_sent_later():
    """0.4 steps, three times: 0, 1, 0."""
    job, same = job_of(ErrorFeedback(Int8())), [127, 0.4, 0.0, -127]
    assert [moved(job, same, same)[1] for _ in range(3)] == [0, 1, 0]
    assert [each[1] for each in kept(job)] == pytest.approx([0.2, 0.2], abs=1e-6)


def test_zeros_stay_zeros():
    assert moved(job_of(ErrorFeedback(Int8())), [0.0] * 4, [0.0] * 4) == [0, 0, 0, 0]


def test_a_quarter_of_the_bytes_travels_with_a_step_for_each_block():
    job = job_of(Int8(64), count=1000)
    moved(job, [1.0] * 1000, [1.0] * 1000)
    (start,) = job.job.trainer["step"].graph.find_nodes(op="call_function", target=ops.gather_parts)  # type: ignore[union-attr]
    assert [source.meta["val"].nbytes for source in start.args[0]] == [1024, 16 * 4]  # type: ignore[union-attr]


def test_differences_of_trainers_that_train_alone_are_compressed_too():
    """Every other step two steps are exchanged; what was left out is sent with the next exchange."""
    model = Numbers()
    plan = Rules(LocalSteps(2, over=AllReduce(compress=TopK(0.5))))
    job = syncwright.loopback(products, model, torch.optim.SGD(model.parameters(), lr=1.0), plan=plan, trainers=2)
    assert [moved(job, FIRST, FIRST) for _ in range(2)][1] == [8, 0, -6, 0]
    assert [moved(job, FIRST, FIRST) for _ in range(2)][1] == [8, 0, 0, 8]


@pytest.mark.parametrize("by", [TopK(0.5), Int8(), ErrorFeedback(TopK(0.5)), ErrorFeedback(Int8())])
def test_parts_are_refused(by):
    with pytest.raises(
        PlanError, match=r"found compress: (top_k|int8), but what it sends cannot be added up on the way"
    ):
        Shard(1, compress=by)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(0.0), r"TopK\.ratio: found 0\.0, expected a number above 0 and at most 1"),
        (lambda: TopK(1.5), r"TopK\.ratio: found 1\.5, expected a number above 0 and at most 1"),
        (lambda: TopK(0.1, momentum=1.0), r"TopK\.momentum: found 1\.0, expected a number of at least 0 and below 1"),
        (lambda: TopK(0.25, warmup_steps=4), r"found warmup_steps: 4 with ratio: 0\.25, but a warm-up begins at 0\.25"),
        (lambda: Int8(0), r"Int8\.block: found 0, expected a whole number of at least 1"),
        (
            lambda: ErrorFeedback(ErrorFeedback(Cast("float16"))),
            r"ErrorFeedback\.of: .* expected one of Cast\(\), TopK\(\), Int8",
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, message):
    with pytest.raises(PlanError, match=message):
        make()
