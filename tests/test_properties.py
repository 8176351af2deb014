"""Any plan lowers, verifies and trains like one device; any program is its text; nobody changes what they are given."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import syncwright
from syncwright import AllReduce, Local, ParameterServer, Rules
from syncwright.job import Job
from syncwright.lower import communications, lower
from syncwright.plan import Blocks, Even, Hash, LeastLoaded, On, RoundRobin, Uneven, Whole
from syncwright.planning import make_plan
from syncwright.program import Program
from syncwright.runtime.loopback import Loopback
from syncwright.text import parse, to_text
from syncwright.verify import verify, verify_inputs_unchanged, verify_job
from tests import zoo
from tests.equivalence import SplitTrainer, combines_pieces, differences
from tests.mirrored import run_mirrored, some_values

STEPS = 3
VOCABULARY, WIDTH = 7, 5
OPTIMIZERS = ("SGD", "SGD-nesterov", "Adam-amsgrad", "AdamW", "RMSprop-centered", "Muon")


class Stack(nn.Module):
    """Layers on numbers or on looked up rows; `tied` reads the table a second time as the output layer."""

    def __init__(self, layers: int, looked_up: bool, tied: bool):
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH) if looked_up else None
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.output = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if self.table is not None and tied:
            self.output.weight = self.table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is not None:
            x = self.table(x).mean(1)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.output(x)


@dataclass(frozen=True, slots=True)
class Drawn:
    """One job on one model."""

    layers: int
    looked_up: bool
    tied: bool
    optimizer: str
    clip: bool
    wide: bool
    parts: tuple[int, ...]
    servers: int
    default: object
    patterns: tuple[tuple[str, object], ...]

    def model(self) -> tuple[nn.Module, zoo.OptimizerTree]:
        torch.manual_seed(3)
        model = Stack(self.layers, self.looked_up, self.tied).to(torch.float64 if self.wide else torch.float32)
        return model, zoo.OPTIMIZERS[self.optimizer](model)

    def rules(self, model: nn.Module) -> Rules:
        names = [name for name, _ in model.named_parameters()]
        there = tuple((p, sync) for p, sync in self.patterns if any(p.strip("*") in name for name in names))
        return Rules(self.default, there, uncuttable="keep_whole")  # type: ignore[arg-type]

    def batches(self) -> list[list[zoo.Batch]]:
        generator = torch.Generator().manual_seed(7)
        return [[self._part(generator, n) for n in self.parts] for _ in range(STEPS)]

    def _part(self, generator: torch.Generator, n: int) -> zoo.Batch:
        y = torch.randint(VOCABULARY, (n,), generator=generator)
        if self.looked_up:
            return torch.randint(VOCABULARY, (n, 3), generator=generator), y
        dtype = torch.float64 if self.wide else torch.float32
        return torch.randn(n, WIDTH, generator=generator, dtype=dtype), y


def syncs(alone: bool, servers: int) -> st.SearchStrategy:
    places = st.sampled_from([RoundRobin(), Hash(), LeastLoaded(), On(servers - 1)])
    partitions = st.sampled_from([Whole(), Even(2), Even(3), Blocks(4), Uneven(2)])
    served = st.builds(lambda partition, place: ParameterServer(partition=partition, place=place), partitions, places)
    reduced = st.sampled_from([AllReduce(), AllReduce(bucket_mb=0.0), AllReduce(bucket_mb=1e-4)])
    return st.one_of(served, reduced, st.just(Local())) if alone else st.one_of(served, reduced)


@st.composite
def jobs(draw) -> Drawn:
    parts = draw(st.sampled_from([(2,), (2, 2), (3, 2), (2, 2, 2), (3, 2, 2), (2, 2, 0), (0, 2)]))
    servers = draw(st.integers(1, 3))
    sync = syncs(len(parts) == 1, servers)
    patterns = ["*table*", "*layers.0*", "*bias*", "*output*"]
    return Drawn(
        layers=draw(st.integers(1, 4)),
        looked_up=draw(st.booleans()),
        tied=draw(st.booleans()),
        optimizer=draw(st.sampled_from(OPTIMIZERS)),
        clip=draw(st.booleans()),
        wide=draw(st.booleans()),
        parts=parts,
        servers=servers,
        default=draw(sync),
        patterns=tuple((pattern, draw(sync)) for pattern in patterns if draw(st.booleans())),
    )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(jobs())
def test_any_plan_trains_like_one_device(drawn: Drawn):
    """Bit-equal to the split reference; where a norm is put together from pieces, up to its rounding."""
    step = zoo.Step(F.cross_entropy, 0.1 if drawn.clip else None)
    model, optimizer = drawn.model()
    job = syncwright.loopback(
        step, model, optimizer, plan=drawn.rules(model), trainers=len(drawn.parts), servers=drawn.servers
    )
    alone, its_optimizer = drawn.model()
    reference = SplitTrainer(step, alone, its_optimizer, drawn.parts)
    losses = [(job.step(parts), reference.step(parts)) for parts in drawn.batches()]
    job.sync()
    check_communications(job)
    found = dict(model.state_dict()) | {f"loss {n}": loss for n, (loss, _) in enumerate(losses)}
    expected = dict(alone.state_dict()) | {f"loss {n}": loss for n, (_, loss) in enumerate(losses)}
    program = next(iter(job.session.programs()._kept)).captured.program
    assert job.job is not None
    limit = (1e-9 if drawn.wide else 1e-4) if combines_pieces(program, job.job) else 0.0
    worst = max(differences(found, expected).items(), key=lambda item: item[1])
    assert worst[1] <= limit, worst


def check_communications(job: Loopback) -> None:
    """Steps captured for other shapes of batch send and wait in one order, and so does an idle trainer."""
    kinds = set()
    for prepared in job.session.programs()._kept:
        assert job.job is not None
        assert prepared.job.digest == job.job.digest
        kinds.add(tuple((str(n.target), *map(str, n.args[1:2])) for n in communications(prepared.job.trainer["step"])))
    assert len(kinds) == 1


@pytest.mark.parametrize("name", zoo.MODELS)
@pytest.mark.parametrize("optimizer", ["SGD-nesterov", "RAdam"])
def test_programs_of_the_zoo(name: str, optimizer: str):
    """Every program, of every role: text -> parse -> text is the identity, and a run changes none of its inputs."""
    model, optimizers = zoo.make_model(name, optimizer, torch.float32)
    ((x, y),) = zoo.make_batches(name, torch.float32, 2, 1)
    program = syncwright.capture(zoo.make_step(name, clip=True), model, optimizers, x, y)
    check_text(program)
    verify_inputs_unchanged(program, some_values(program))
    for job in jobs_of(program):
        verify_job(job)
        for each in job.trainer.values():
            check_text(each)
            check_inputs_unchanged(each)
        for each in [p for part in job.servers for p in part.programs]:
            check_text(each)
            verify_inputs_unchanged(each, some_values(each))


def jobs_of(program: Program) -> list[Job]:
    cut = Rules(ParameterServer(partition=Blocks(4)), (("*bias*", AllReduce()),), uncuttable="keep_whole")
    plans: list[Rules | str] = ["all_reduce", cut, Rules(ParameterServer(partition=Blocks(4)), uncuttable="keep_whole")]
    return [lower(program, make_plan(plan, program, trainers=2, servers=2)) for plan in plans]


def check_text(program: Program) -> None:
    text = to_text(program)
    again = parse(text)
    assert to_text(again) == text
    verify(again)


def check_inputs_unchanged(program: Program) -> None:
    """As `verify_inputs_unchanged`, with peers and servers that answer anything."""
    values = some_values(program)
    copies = {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in values.items()}
    run_mirrored(program, copies, 2, _Anything())
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(copies[name], value), name  # type: ignore[arg-type]


class _Anything(dict):
    """Truth about values that nobody looks at: zeros of the size asked for."""

    def __missing__(self, key: tuple[str, bool]) -> torch.Tensor:
        return torch.zeros(())
