"""What is the same in loopback and in processes: evaluation, saving and loading, the check of replicas."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import syncwright
from syncwright import AllReduce, ParameterServer, Rules
from syncwright.errors import BatchError, CaptureError, Disagreement
from syncwright.lower import lower
from syncwright.plan import Even
from syncwright.planning import make_plan
from syncwright.runtime.evaluation import Evaluations, pulling
from syncwright.runtime.limits import limit_of, limits_of
from syncwright.runtime.loopback import Loopback, Network
from syncwright.runtime.messages import Address, Kind
from syncwright.runtime.structure import difference
from syncwright.runtime.wire import decode, encode
from syncwright.text import to_text
from syncwright.tree import skeleton
from tests.golden_files import check_golden

MIXED = Rules.of(AllReduce(), {"0.*": ParameterServer(partition=Even(2))})


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)).double()
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def step(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = F.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    return loss


def data(examples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(examples, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x, x[:, :2]


def trained(plan: object, trainers: int, servers: int, **options: object) -> Loopback:
    job = syncwright.loopback(step, *build(), plan=plan, trainers=trainers, servers=servers, **options)  # type: ignore[arg-type]
    for seed in range(2):
        x, y = data(4 * trainers, seed)
        job.step(list(zip(x.split(4), y.split(4), strict=True)))
    return job


def scores(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    model.eval()
    return {"score": model(x)[:, 0], "label": y[:, 0] > 0}


def area(found: dict[str, torch.Tensor]) -> float:
    """The area under the curve of true over false positives: how often a positive is scored above a negative."""
    positive, negative = found["score"][found["label"]], found["score"][~found["label"]]
    above = (positive[:, None] > negative).double() + 0.5 * (positive[:, None] == negative)
    return above.mean().item()


PLANS = [("all_reduce", 0), ("parameter_server", 1), (MIXED, 2)]


@pytest.mark.parametrize(("plan", "servers"), PLANS)
@pytest.mark.parametrize("trainers", [1, 2, 3])
def test_an_evaluation_gives_every_example_once_in_order(plan, servers, trainers):
    """13 examples in batches of 4: the last batch has 1, so some trainers have no part of it."""
    job = trained(plan, trainers, servers)
    held_out = TensorDataset(*data(13, 9))
    found = job.evaluate(scores, DataLoader(held_out, batch_size=4))
    model, _ = build()
    model.load_state_dict(job.state_dict()["model"])  # type: ignore[arg-type]
    with torch.no_grad():
        expected = scores(model, *held_out.tensors)
    assert torch.equal(found["label"], expected["label"])
    torch.testing.assert_close(found["score"], expected["score"], rtol=1e-13, atol=1e-15)
    assert area(found) == area(expected)


def test_an_evaluation_changes_nothing_also_with_batch_norm_that_trains():
    job, twin = trained(MIXED, 2, 2), trained(MIXED, 2, 2)
    batches = DataLoader(TensorDataset(*data(12, 9)), batch_size=4)
    x, y = data(8, 5)
    job.evaluate(lambda model, x, y: model(x), batches)
    for each in (job, twin):
        each.step([(x[:4], y[:4]), (x[4:], y[4:])])
    mine, other = job.state_dict(), twin.state_dict()
    assert all(torch.equal(a, other["model"][name]) for name, a in mine["model"].items())  # type: ignore[index,union-attr]


def test_train_and_eval_are_as_the_user_has_set_them():
    job = trained("all_reduce", 1, 0)
    batches = DataLoader(TensorDataset(*data(8, 9)), batch_size=4)

    def outputs(model, x, y):
        return model(x)

    normed = job.evaluate(outputs, batches)
    job.model.eval()
    running = job.evaluate(outputs, batches)
    assert not torch.allclose(normed, running)
    job.model.train()
    assert torch.equal(job.evaluate(outputs, batches), normed)


def test_an_evaluation_before_the_first_step_has_the_initial_values():
    model, optimizer = build()
    job = syncwright.loopback(step, model, optimizer, plan=MIXED, trainers=2, servers=2)
    x, y = data(8, 9)
    found = job.evaluate(scores, [(x, y)])
    with torch.no_grad():
        assert torch.equal(found["score"], copy.deepcopy(model).eval()(x)[:, 0])
    job.step([(x[:4], y[:4]), (x[4:], y[4:])])
    assert not torch.equal(job.evaluate(scores, [(x, y)])["score"], found["score"])  # type: ignore[index]


def test_an_evaluation_of_no_batches_is_none():
    assert trained("all_reduce", 2, 0).evaluate(scores, []) is None


def test_a_function_written_anew_in_every_epoch_is_captured_once(monkeypatch):
    job = trained(MIXED, 2, 2)
    captures = []
    captured = Evaluations._captured
    monkeypatch.setattr(Evaluations, "_captured", lambda *given: captures.append(1) or captured(*given))
    for _ in range(3):
        job.evaluate(lambda model, x, y: model(x), [data(8, 9)])
    assert len(captures) == 1
    for scale in (1.5, 2.5):
        job.evaluate(lambda model, x, y, s=scale: model(x) * s, [data(8, 9)])
    assert len(captures) == 3


def test_what_no_evaluation_can_be_is_told():
    job = trained("all_reduce", 2, 0)
    batch = [data(8, 9)]
    with pytest.raises(BatchError) as scalar:
        job.evaluate(_mean, batch)
    with pytest.raises(CaptureError) as branch:
        job.evaluate(_decides, batch)
    check_golden("errors/evaluate", re.sub(r"py:\d+", "py:N", f"{scalar.value}\n\n{branch.value}\n"))


def _mean(model, x, y):
    return {"mean": model(x).mean()}


def _decides(model, x, y):
    return model(x) if x.sum() > 0 else model(-x)


def test_an_evaluation_as_a_program():
    job = trained(MIXED, 2, 2)
    evaluations = Evaluations(job.binding, job.optimizer, lambda: False)
    assert job.job is not None
    evaluated = evaluations.for_batch(lambda model, x, y: model(x), data(4, 9), 4, job.job)
    program = pulling(evaluated._captured.program, evaluated._captured.outputs, job.job.held, job.job.tables)
    check_golden("evaluate/mixed", to_text(program))


def test_a_state_may_be_loaded_where_a_server_holds_no_variable():
    """All variables are on server 0; server 1 only joins the parts of the global norm."""
    x, y = data(8, 1)
    program = syncwright.capture(clipped, *build(), x[:4], y[:4])
    plan = replace(make_plan("parameter_server", program, 2, 2), reducer=1)
    job = syncwright.loopback(clipped, *build(), plan=plan, trainers=2, servers=2)
    parts = [(x[:4], y[:4]), (x[4:], y[4:])]
    job.step(parts)
    saved = job.state_dict()
    first = job.step(parts)
    job.load_state_dict(saved)
    assert job.step(parts) == first


def clipped(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = F.mse_loss(model(x), y)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    return loss


@pytest.mark.parametrize("name", ["3.weight", "3.weight.momentum_buffer"])
def test_replicas_that_drift_apart_are_found(name):
    job = trained("all_reduce", 3, 0, check_replicas=True)
    value = job.replicas[1].values[name]
    assert isinstance(value, torch.Tensor)
    value.view(-1)[0] += 1e-9
    x, y = data(12, 5)
    with pytest.raises(Disagreement) as told:
        job.step(list(zip(x.split(4), y.split(4), strict=True)))
    assert "trainer 1 has other bits than trainer 0" in str(told.value)
    assert "after step 2: " in str(told.value)


def test_replicas_that_are_equal_pass_the_check():
    job = trained(MIXED, 2, 2, check_replicas=True)
    assert job.replicas[0].step_count == 2


def measured(model, optimizer, x, y):
    optimizer.zero_grad()
    out = model(x)
    loss = F.mse_loss(out, y)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    return loss, {"mean": (out - y).mean(), "right": (out.sign() == y.sign()).sum(), "rows": out}


@pytest.mark.parametrize(("plan", "servers"), [*PLANS, ("parameter_server", 2)])
def test_every_message_of_a_job_is_what_its_receiver_accepts(monkeypatch, plan, servers):
    """Also those of an evaluation, of saving and of loading."""
    posted, post = [], Network.post

    def checked(self, sender, to, message):
        assert job.job is not None
        decode(encode(message), limit_of(job.job, to))
        limits_of(job.job, to).check(sender, message.header)
        posted.append(message)
        post(self, sender, to, message)

    monkeypatch.setattr(Network, "post", checked)
    job = syncwright.loopback(measured, *build(), plan=plan, trainers=2, servers=servers)
    for count in (4, 3):  # another shape: limits hold for it too
        x, y = data(2 * count, 1)
        job.step([(x[:count], y[:count]), (x[count:], y[count:])])
    job.evaluate(scores, [data(8, 9)])
    job.load_state_dict(job.state_dict())
    job.leave()
    assert bool(posted) == (servers > 0)


def test_what_each_role_accepts():
    x, y = data(4, 1)
    program = syncwright.capture(clipped, *build(), x, y)
    job = lower(program, make_plan(MIXED, program, 2, 2))
    lines = []
    for me in (Address(Kind.TRAINER, 0), Address(Kind.SERVER, 0), Address(Kind.SERVER, 1)):
        lines += [f"== {me}", *sorted(f"{name} {shape} {dtype}" for name, (shape, dtype) in limit_of(job, me).items())]
    check_golden("limits/mixed", "\n".join(lines) + "\n")


def test_a_schedule_that_is_built_after_the_job_counts_from_its_start():
    """Rprop's first state is its learning rate, which a schedule has lowered before the first step."""
    parameters = []
    for late in (False, True):
        model, _ = build()
        optimizer = torch.optim.Rprop(model.parameters(), lr=0.01)
        job = syncwright.loopback(step, model, optimizer, trainers=1) if late else None
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.1)
        job = job or syncwright.loopback(step, model, optimizer, trainers=1)
        job.step([data(4, 1)])
        parameters.append(job.state_dict()["model"]["0.weight"])  # type: ignore[index]
    assert torch.equal(parameters[0], parameters[1])


@pytest.mark.parametrize(
    ("found", "expected", "said"),
    [
        ((1, 2), (1, 2), None),
        ((1,), (1, 2), "found 1 argument, expected 2"),
        (((1, 2), 3, 4), (1, 2), "found 3 arguments, expected 2"),
        (((1, 2),), (1,), "argument 0 is a tuple of 2, expected one value"),
        ((1, [2, 3]), (1, (2, 3)), "argument 1 is a list of 2, expected a tuple of 2"),
        (
            (1, {"ids": 2}),
            (1, {"ids": 2, "mask": 3}),
            "argument 1 is a dict with 'ids', expected a dict with 'ids', 'mask'",
        ),
        (
            ({"a": [1, {"b": 2}]},),
            ({"a": [1, {"b": []}]},),
            "argument 0['a'][1]['b'] is one value, expected a list of 0",
        ),
        ((None,), (1,), None),
    ],
)
def test_how_batches_are_built_differently_in_words(found, expected, said):
    assert difference(skeleton(found), skeleton(expected)) == said


def test_a_trainer_keeps_no_value_that_it_has_pulled_for_the_last_time():
    job = trained("parameter_server", 2, 1)
    for replica in job.replicas:
        assert {version for _, version in replica.client._got} <= {replica.step_count}
    job.state_dict()
    assert job.replicas[0].client._got == {}
