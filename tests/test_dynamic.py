"""Axes of any size: one capture for all, equal to the bit to a capture for each, in text and under every plan."""

from __future__ import annotations

import logging
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

import syncwright
from syncwright.capture import capture_step
from syncwright.capture.axes import dynamic_axes
from syncwright.capture.sizes import with_sizes
from syncwright.capture.state import Binding
from syncwright.errors import CaptureError
from syncwright.program import Program, Role
from syncwright.runtime.inductor import is_available, obstacle
from syncwright.text import parse, to_text
from syncwright.verify import verify
from tests import zoo
from tests.equivalence import check_replicas

BOTH = ({0: "n"}, {0: "n"})


def batch_of(model: str, size: int, seed: int = 7) -> zoo.Batch:
    return zoo.MODELS[model].batch(torch.Generator().manual_seed(seed), size)


def captured_at(model: str, size: int, dynamic_shapes: object = None):
    network, optimizer = zoo.make_model(model, "SGD", torch.float32)
    binding, batch = Binding(network, optimizer), batch_of(model, size)
    axes = dynamic_axes(batch, dynamic_shapes)
    return binding, capture_step(zoo.make_step(model, True), binding, optimizer, batch, axes)


@pytest.mark.parametrize("model", zoo.MODELS)
def test_one_capture_stands_for_every_size(model):
    binding, captured = captured_at(model, 4, BOTH)
    program, batch = captured.program, batch_of(model, 7)
    static = captured_at(model, 7)[1].program
    given = {
        **binding.values(),
        **binding.hyper_values(),
        **captured.constants,
        "batch.0": batch[0],
        "batch.1": batch[1],
    }
    found, expected = [], []
    for run, results in ((program, found), (static, expected)):
        torch.manual_seed(1)
        with torch.no_grad():
            results.append(run.run(given))
    assert found[0].keys() == expected[0].keys()
    assert all(torch.equal(value, expected[0][name]) for name, value in found[0].items())
    fixed = with_sizes(program, {name: tuple(tensor.shape) for name, tensor in _tensors(batch)})
    assert _unnumbered(fixed) == _unnumbered(static)


def _unnumbered(program: Program) -> str:
    """Which of several nodes of one op is `%add_3` and which `%add_4` may differ."""
    return re.sub(r"(%[a-z_]+?)(_\d+)?\b", r"\1", to_text(program))


def _tensors(batch):
    return [(f"batch.{index}", tensor) for index, tensor in enumerate(batch)]


@pytest.mark.parametrize("model", ["linear", "transformer", "conv_train"])
def test_text_and_verifier_know_dynamic_axes(model):
    _, captured = captured_at(model, 4, BOTH)
    text = to_text(captured.program)
    again = parse(text)
    assert to_text(again) == text
    assert again.variables["batch.0"].dynamic == (0,)
    assert again.guards == captured.program.guards
    verify(again)


def test_guards_say_which_sizes_must_be_equal_and_how_small_they_may_be():
    program = captured_at("linear", 4, BOTH)[1].program
    sizes = [guard for guard in program.guards if guard.axes]
    hypers = {v.name: 0.0 for v in program.of_role(Role.HYPER)}

    def hold(x: int, y: int) -> bool:
        return all(guard.holds(hypers | {"batch.0": (x, 4), "batch.1": (y, 3)}) for guard in sizes)

    assert hold(2, 2)
    assert hold(9, 9)
    assert not hold(9, 8)
    assert not hold(1, 1)


@pytest.mark.parametrize("plan", ["all_reduce", "parameter_server_partitioned", "parallax"])
def test_ragged_parts_of_a_job_need_one_capture(plan, caplog):
    steps = [(5, 3, 2), (4, 4, 4), (7, 2, 0), (3, 6, 9)]

    def trained(dynamic_shapes):
        model, optimizer = zoo.make_model("embedding", "Adam", torch.float32)
        step = zoo.make_step("embedding", True)
        job = syncwright.loopback(
            step, model, optimizer, plan=plan, trainers=3, servers=2, dynamic_shapes=dynamic_shapes
        )
        for index, sizes in enumerate(steps):
            job.step([batch_of("embedding", size, index + 10 * k) for k, size in enumerate(sizes)])
        check_replicas(job)
        return job.state_dict()

    with caplog.at_level(logging.INFO, "syncwright"):
        found = trained(BOTH)
    assert sum("captured the step" in record.message for record in caplog.records) == 1
    torch.testing.assert_close(found, trained(None), rtol=0, atol=0)


def descend(model, optimizer, batch):
    optimizer.zero_grad()
    loss = F.mse_loss(model(batch["x"]), batch["y"])
    loss.backward()
    optimizer.step()
    return loss


@pytest.mark.parametrize(
    "compile", [False, pytest.param(True, marks=pytest.mark.skipif(not is_available(), reason=str(obstacle())))]
)
def test_a_marked_first_batch_stands_for_all_others(compile, caplog):
    """Compiled, every shape is made from the one capture."""
    calls = []

    def step(model, optimizer, batch):
        calls.append(batch["x"])
        return descend(model, optimizer, batch)

    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    plain = nn.Linear(3, 2)
    plain.load_state_dict(model.state_dict())
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain))
    batches = [{"x": torch.randn(n, 3), "y": torch.randn(n, 2)} for n in (4, 6, 1, 5, 4)]
    torch._dynamo.mark_dynamic(batches[0]["x"], 0)
    torch._dynamo.mark_dynamic(batches[0]["y"], 0)
    with syncwright.distribute(step, model, optimizer, compile=compile) as trainer:
        losses = [float(trainer.step(batch)) for batch in batches]
    assert losses == pytest.approx([float(descend(plain, other, batch)) for batch in batches], rel=1e-6)
    assert len(calls) == 2


def test_a_step_that_fixes_a_dynamic_size_is_refused_with_its_line():
    def fixed(model, optimizer, x, y):
        return zoo.Step(F.mse_loss)(model, optimizer, x.view(4, 4) + 0, y)

    model, optimizer = zoo.make_model("linear", "SGD", torch.float32)
    with pytest.raises(CaptureError) as caught:
        syncwright.capture(fixed, model, optimizer, *batch_of("linear", 4), dynamic_shapes=BOTH)
    assert str(caught.value).startswith("test_dynamic.py:")
    assert "x.view(4, 4)" in str(caught.value)
    assert "axis 0 of 'batch.0' is marked dynamic, but here the step takes it to be 4" in str(caught.value)


def test_dynamic_shapes_are_those_of_torch_export():
    batch = (torch.zeros(4, 3), {"a": torch.zeros(4, 5), "b": 2}, [torch.zeros(1, 2)])
    asked = ({0: Dim("n")}, {"a": (Dim.DYNAMIC, None)}, [{-1: Dim.AUTO}])
    assert dynamic_axes(batch, asked) == {"batch.0": (0,), "batch.1.a": (0,), "batch.2.0": (1,)}
    assert dynamic_axes(batch, (None, None, None)) == {}
    torch._dynamo.mark_dynamic(batch[0], 1)
    assert dynamic_axes(batch, asked)["batch.0"] == (0, 1)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (({0: "n"},), "expected a tree like the batch"),
        (({2: "n"}, None), "found axis 2 for 'batch.0' of shape [4, 3]; expected one of its axes, 0 to 1"),
        ((3, None), "expected a dict by axis"),
    ],
)
def test_other_dynamic_shapes_are_refused(asked, message):
    with pytest.raises(CaptureError) as caught:
        dynamic_axes((torch.zeros(4, 3), torch.zeros(4, 2)), asked)
    assert message in str(caught.value)
