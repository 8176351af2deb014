"""Misuses in one process: each is an error whose message is golden text.

Every message, here and in tests/distributed/test_jobs.py, names the variable or the line, says what was found and what
was expected, and what to do.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD

import syncwright
from syncwright import ParameterServer, Plan, Rules
from syncwright.errors import (
    BatchError,
    CaptureError,
    ClusterError,
    JobError,
    LoweringError,
    PlanError,
    SyncwrightError,
)
from syncwright.planning import make_plan
from syncwright.runtime.membership import membership
from syncwright.runtime.server import Server
from syncwright.runtime.sockets import Deadlines
from tests.golden_files import GOLDEN, check_golden
from tests.scripts import misuse_steps as misuse

STEPS = Path(misuse.__file__)
BATCH = (torch.ones(3, 4), torch.ones(3, 2))
EMPTY = (torch.ones(0, 4), torch.ones(0, 2))

Case = Callable[[], object]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 2)


def captured(step: Callable, kind: type = SGD, **options: object) -> syncwright.Program:
    built = model()
    return syncwright.capture(step, built, kind(built.parameters(), **({"lr": 0.1} | options)), *BATCH)


def run(step: Callable, *batches: list[tuple], **options: object) -> object:
    """The steps of a loopback job on these batches, a list of one per trainer each."""
    built = model()
    job = syncwright.loopback(step, built, SGD(built.parameters(), lr=0.1), trainers=len(batches[0]), **options)
    return [job.step(batch) for batch in batches]


def planned(plan: object, trainers: int = 2, servers: int = 1) -> Plan:
    return make_plan(plan, captured(misuse.plain), trainers, servers)  # type: ignore[arg-type]


# --- the step, the model, the optimizer ----------------------------------------------------------------


def scheduled() -> object:
    built = model()
    optimizer = SGD(built.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    return syncwright.capture(misuse.scheduled(scheduler), built, optimizer, *BATCH)


def foreign_parameter() -> object:
    built, other = model(), torch.zeros(3, requires_grad=True)
    return syncwright.capture(misuse.plain, built, SGD([*built.parameters(), other], lr=0.1), *BATCH)


def one_parameter_in_two_optimizers() -> object:
    built = model()
    both = tuple(SGD(built.parameters(), lr=0.1, momentum=0.9) for _ in range(2))
    return syncwright.capture(misuse.plain, built, both, *BATCH)


def a_parameter_called_as_a_hyper_parameter() -> object:
    built = misuse.LooksLikeRate()
    return syncwright.capture(misuse.plain, built, SGD(built.parameters(), lr=0.1), *BATCH)


def late_state() -> object:
    built = model()
    return syncwright.capture(misuse.plain, built, misuse.LateState(built.parameters()), *BATCH)


class OtherScaler(torch.amp.GradScaler):
    def step(self, optimizer, *args, **kwargs):
        return super().step(optimizer, *args, **kwargs)


def not_a_module_as_state() -> object:
    built = model()
    state = {"ema": torch.zeros(2)}
    return syncwright.capture(misuse.plain, built, SGD(built.parameters(), lr=0.1), *BATCH, state=state)  # type: ignore[arg-type]


CAPTURE: dict[str, Case] = {
    "if loss.isnan()": lambda: captured(misuse.branch_on_tensor),
    "loss.item() in a branch": lambda: captured(misuse.branch_on_item),
    "float(loss)": lambda: captured(misuse.float_of_tensor),
    "loss.numpy()": lambda: captured(misuse.to_numpy),
    "print(loss)": lambda: captured(misuse.prints),
    "print(loss.item())": lambda: captured(misuse.prints_item),
    "an f-string": lambda: captured(misuse.formats),
    "an f-string with digits": lambda: captured(misuse.formats_with_digits),
    "an f-string of an item": lambda: captured(misuse.formats_item),
    "a log line": lambda: captured(misuse.logs),
    "scheduler.step() in the step": scheduled,
    "a learning rate set in the step": lambda: captured(misuse.changes_rate),
    "GradScaler without update()": lambda: captured(misuse.scaled_without_update(torch.amp.GradScaler("cpu"))),
    "GradScaler with a closure": lambda: captured(misuse.scaled_with_closure(torch.amp.GradScaler("cpu"))),
    "a GradScaler that steps otherwise": lambda: captured(misuse.scaled(OtherScaler("cpu"))),
    "a closure": lambda: captured(misuse.closure),
    "LBFGS": lambda: captured(misuse.closure, torch.optim.LBFGS),
    "a seed in the step": lambda: captured(misuse.seeds),
    "random numbers to be drawn again by the next step": lambda: captured(misuse.rewinds),
    "other numbers from the same random state": lambda: captured(misuse.draws_otherwise),
    "a tensor from outside": lambda: captured(misuse.tensor_from_outside),
    "a gradient that outlives the step": lambda: captured(misuse.no_zero_grad),
    "a step that returns a constant": lambda: captured(misuse.returns_constant),
    "a step that returns nothing": lambda: captured(misuse.returns_nothing),
    "a step that fails on its own": lambda: captured(misuse.wrong_module),
    "a batch of too few arguments": lambda: syncwright.capture(
        misuse.plain, (built := model()), SGD(built.parameters()), BATCH[0]
    ),
    "an optimizer with a foreign parameter": foreign_parameter,
    "a first update unlike the others": lambda: captured(misuse.plain, misuse.Sudden),
    "a word in the optimizer's state": lambda: captured(misuse.plain, misuse.Labelled),
    "state that a later update makes": late_state,
    "an optimizer's class": lambda: syncwright.capture(misuse.plain, model(), SGD, *BATCH),
    "a function as the model": lambda: syncwright.capture(misuse.plain, len, SGD(model().parameters()), *BATCH),  # type: ignore[arg-type]
    "one parameter in two optimizers": one_parameter_in_two_optimizers,
    "a parameter called as a hyper-parameter": a_parameter_called_as_a_hyper_parameter,
    "a tensor as further state": not_a_module_as_state,
}

# --- plans ---------------------------------------------------------------------------------------------


def plan_of_another_program() -> object:
    other = nn.Sequential(nn.Linear(4, 2))
    program = syncwright.capture(misuse.plain, other, SGD(other.parameters(), lr=0.1), *BATCH)
    return planned(make_plan("all_reduce", program, 2, 1))


def plan_of_another_optimizer() -> object:
    return planned(make_plan("all_reduce", captured(misuse.plain, momentum=0.9), 2, 1))


PLANS: dict[str, Case] = {
    "an unknown variable": lambda: planned(Rules.of(ParameterServer(), {"wieght": ParameterServer()})),
    "an unknown strategy": lambda: planned("allreduce"),
    "a plan of a wrong type": lambda: planned(3),
    "a plan of another program": plan_of_another_program,
    "a plan of another optimizer": plan_of_another_optimizer,
    "no servers": lambda: planned("parameter_server", servers=0),
    "fewer servers than planned": lambda: planned(planned("parameter_server_balanced", servers=2), servers=1),
    "another number of trainers": lambda: planned(planned("all_reduce", trainers=3)),
}

# --- lowering, batches, the place in the job -----------------------------------------------------------

PAIR = [BATCH, BATCH]
LOWERING: dict[str, Case] = {
    "a matrix is returned": lambda: run(misuse.returns_matrix, PAIR),
    "an update that reads the forward on a server": lambda: run(
        misuse.decays_by_loss, PAIR, plan="parameter_server", servers=1
    ),
    "an unknown pass is left out": lambda: run(misuse.plain, PAIR, without=["average_gradient"]),
}
BATCHES: dict[str, Case] = {
    "another structure": lambda: run(misuse.plain, [BATCH], [(BATCH,)]),
    "no leading axis": lambda: run(misuse.plain, [(torch.tensor(1.0), torch.tensor(2.0))]),
    "too few parts": lambda: run(misuse.plain, PAIR, [BATCH]),
    "no examples at all": lambda: run(misuse.plain, PAIR, [EMPTY, EMPTY]),
    "a count of examples below 0": lambda: run(misuse.plain, PAIR, examples=lambda x, y: -1),
}
PLACES: dict[str, Case] = {
    "an unknown role": lambda: membership({"SYNCWRIGHT_ROLE": "worker"}),
    "a launcher's variable is missing": lambda: membership({"SYNCWRIGHT_ROLE": "trainer"}),
    "a number that is none": lambda: membership({"RANK": "0", "WORLD_SIZE": "two"}),
    "a rank beyond the last": lambda: membership({"RANK": "2", "WORLD_SIZE": "2"}),
}

GROUPS: dict[str, tuple[type[SyncwrightError], Mapping[str, Case]]] = {
    "capture": (CaptureError, CAPTURE),
    "plans": (PlanError, PLANS),
    "lowering": (LoweringError, LOWERING),
    "batches": (BatchError, BATCHES),
    "places": (ClusterError, PLACES),
}


def test_a_servers_error_reaches_the_trainer_and_close_does_not_hang(monkeypatch: pytest.MonkeyPatch):
    built = model()
    deadlines = Deadlines(join=20, wait=20, linger=1)
    trainer = syncwright.distribute(
        misuse.plain,
        built,
        SGD(built.parameters(), lr=0.1),
        plan="parameter_server",
        compile=False,
        deadlines=deadlines,
    )
    trainer.step(*BATCH)
    monkeypatch.setattr(Server, "_advance", lambda self: torch.ones(2) @ torch.ones(3))
    begun = time.monotonic()

    def steps() -> None:
        """The first may have what it needs from the server before its push, or the one before, comes there."""
        for _ in range(3):
            trainer.step(*BATCH)

    with pytest.raises(
        JobError,
        match=r"^trainer 0 cannot go on: server 0 at step \d: found RuntimeError: inconsistent tensor size.* Run the step",
    ):
        steps()
    trainer.close()
    assert time.monotonic() - begun < 15
    with pytest.raises(JobError, match="this trainer is closed; expected steps before close"):
        trainer.step(*BATCH)


@pytest.mark.parametrize("group", GROUPS)
def test_misuses_are_told(group: str):
    kind, cases = GROUPS[group]
    said = []
    for title, case in cases.items():
        with pytest.raises(kind) as caught:
            case()
        said.append(f"== {title}\n{_steady(str(caught.value))}\n")
    check_golden(f"errors/{group}", "\n".join(said))


def test_the_line_that_is_quoted_is_the_users():
    lines = STEPS.read_text().splitlines()
    with pytest.raises(CaptureError) as caught:
        captured(misuse.branch_on_tensor)
    name, number, quoted = re.match(r'(\w+\.py):(\d+) "(.*)": ', str(caught.value)).groups()  # type: ignore[union-attr]
    assert name == STEPS.name
    assert lines[int(number) - 1].strip() == quoted == "if loss.isnan():"


def test_a_refused_step_leaves_the_users_objects_as_they_were():
    scaler = torch.amp.GradScaler("cpu")
    before = scaler.state_dict()
    with pytest.raises(CaptureError):
        captured(misuse.scaled_without_update(scaler))
    assert scaler.state_dict() == before
    assert scaler._scale is None
    assert not scaler._per_optimizer_states
    assert "_maybe_opt_step" not in vars(scaler)
    assert repr(torch.ones(1)) == "tensor([1.])"
    assert torch.optim.lr_scheduler.StepLR.step is torch.optim.lr_scheduler.LRScheduler.step


def test_a_disabled_scaler_is_no_misuse():
    captured(misuse.scaled(torch.amp.GradScaler("cpu", enabled=False)))


GOLDENS = sorted((GOLDEN / "errors").glob("*.txt"))


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_every_message_keeps_the_rule(path: Path):
    for message in messages(path.read_text()):
        found, *after = re.split(r"[eE]xpected ", message)
        assert found.strip(" ;,:."), f"what was found: {message}"
        assert after, f"what was expected: {message}"
        assert re.search(r"[.;:?)`] [A-Z]\w+|; \w+|, or ", " ".join(after)), f"what to do next: {message}"
        assert message.endswith((".", "?")), message


def test_at_least_25_misuses_are_told_10_of_them_in_processes():
    count = {path.stem: path.read_text().count("== ") for path in GOLDENS}
    assert sum(count.values()) >= 50
    assert count["jobs"] >= 10


def messages(text: str) -> list[str]:
    """The messages of a golden file: one or more below each title, where several begin with a role."""
    below = re.split(r"^== .*\n", text, flags=re.MULTILINE)[1:]
    return [
        each.strip() for part in below for each in re.split(r"^(?=(?:trainer|server) \d, )", part, flags=re.M) if each
    ]


def _steady(message: str) -> str:
    """Line numbers of the misused steps may move, digests are of the installed torch, and passes come and go."""
    message = re.sub(r"(misuse_steps\.py):\d+", r"\1:N", message)
    message = re.sub(r"expected one of serve_parameters, .*?\.", "expected one of <passes>.", message)
    return re.sub(r"\b[0-9a-f]{16}\b", "<digest>", message)
