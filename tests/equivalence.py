"""One job against one device: the two references of SEMANTICS section 0, in plain PyTorch, and the judgement."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, reduce
from itertools import pairwise

import torch
from torch import nn

from syncwright.capture import Captured, capture_step
from syncwright.capture.state import Binding
from syncwright.job import Job
from syncwright.lower import lower
from syncwright.meaning import Scalar
from syncwright.plan import Plan, Shard
from syncwright.planning import make_plan, plan_variables
from syncwright.program import Program, Role
from syncwright.runtime.kept import Given
from syncwright.runtime.loopback import Loopback, loopback
from syncwright.runtime.own_parts import variables_of
from syncwright.runtime.programs import Prepared, Programs
from syncwright.runtime.replica import random_stream
from syncwright.selection import Own
from syncwright.strategies import named
from syncwright.update import find_updates
from tests import zoo

STEPS = 5
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
PLANS: Mapping[str, Mapping[str, object]] = {
    "all_reduce": {},
    "parameter_server": {},
    "parameter_server_partitioned": {"min_elements": 1},
    "parallax": {},
    "zero1": {},
    "zero3": {"bucket_mb": 0.0001},
}
DTYPES = {"float32": torch.float32, "float64": torch.float64}
PARTS = {1: (2,), 2: (2, 2), 3: (2, 2, 2)}
RAGGED = (3, 2, 2)
IDLE = (2, 2, 0)


@dataclass(frozen=True, slots=True)
class Family:
    """What shares captures: everything that the captured graph depends on, but for the batch's shape."""

    model: str
    optimizer: str
    dtype: str
    clip: bool


@dataclass(frozen=True, slots=True)
class Case:
    """One job. `parts` are the examples of each trainer."""

    family: Family
    plan: str
    parts: tuple[int, ...]
    servers: int
    schedule: bool

    @property
    def name(self) -> str:
        f = self.family
        clip, schedule = "clip" if f.clip else "noclip", "cycle" if self.schedule else "constant"
        parts = "+".join(map(str, self.parts))
        return "/".join([f.optimizer, f.model, f.dtype, clip, self.plan, parts, f"S{self.servers}", schedule])

    @classmethod
    def named(cls, name: str) -> Case:
        optimizer, model, dtype, clip, plan, parts, servers, schedule = name.split("/")
        family = Family(model, optimizer, dtype, clip == "clip")
        return cls(family, plan, tuple(map(int, parts.split("+"))), int(servers[1:]), schedule == "cycle")


Values = dict[str, torch.Tensor]
Mean = Callable[[list[torch.Tensor]], torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """Every variable after training, and the loss of every step."""

    values: Values
    losses: tuple[torch.Tensor, ...]

    def all(self) -> Values:
        return self.values | {f"loss of step {i}": loss for i, loss in enumerate(self.losses)}


@dataclass(frozen=True, slots=True, eq=False)
class References:
    """What a case is compared with.

    whole   the concatenated batch; None where something in the step mixes examples or draws numbers
    exact   what the job must equal to the bit: split, or, where a clip norm is put together from pieces of a variable,
            split with a norm that is put together likewise; None where only equality up to rounding is due
    floors  how far plain PyTorch is from itself, per variable: split from whole; where the job may round differently,
            also split from `exact`, and from itself with every averaged gradient moved by one rounding (three ways)
    """

    split: Outcome
    whole: Outcome | None
    exact: Outcome | None
    floors: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Pieces:
    """Variables of which a global value is put together from pieces, with the pieces' sizes.

    A norm of norms is the norm but for rounding. `of_clip_alone`: no optimizer combines norms of its own (Adafactor).
    """

    sizes: tuple[tuple[str, tuple[int, ...]], ...]
    of_clip_alone: bool


@dataclass(frozen=True, slots=True)
class Difference:
    """How far one variable is from a reference, relative to the reference's largest element."""

    variable: str
    found: float
    limit: float
    floor: float

    @property
    def share(self) -> float:
        """Of the limit; where bit-equality is the limit, 0 or infinite."""
        return self.found / self.limit if self.limit else float("inf") if self.found else 0.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a case was judged.

    exact    whether bit-equality with a reference was asked for
    worst    of all variables, the one nearest to its limit (or farthest beyond it), against either reference
    failure  a sentence; empty where the case passed
    """

    case: Case
    exact: bool
    worst: Difference
    failure: str = ""


class Laboratory:
    """Runs the cases of one family, with captures, lowered jobs and references kept between them. Changes with use."""

    def __init__(self, family: Family):
        self.family = family
        self.entry = zoo.MODELS[family.model]
        self.step = zoo.make_step(family.model, family.clip)
        self.dtype = DTYPES[family.dtype]
        self.captured: list[tuple[tuple[int, ...], Captured]] = []
        self._prepared: dict[tuple, Prepared] = {}
        self._references: dict[tuple, References] = {}

    def judge(self, case: Case) -> Verdict:
        """Runs a case and compares it with the references."""
        pieces, outcome = self.run(case)
        return judge(case, outcome, self.references(case, pieces))

    def run(self, case: Case) -> tuple[Pieces, Outcome]:
        """Which variables' norms are put together from pieces, and what the job ends with."""
        model, optimizer = self._objects()
        losses = []
        with _scheduled(optimizer, case.schedule) as advance:
            job = loopback(self.step, model, optimizer, plan=case.plan, trainers=len(case.parts), servers=case.servers)
            job.session.use(_SharedPrograms(self, case, self.step, job.binding, optimizer))
            for parts in self._batches(case):
                losses.append(job.step(parts))
                advance()
        check_replicas(job)
        job.sync()
        assert job.job is not None, "the job has run"
        return combined_pieces(self.captured[0][1].program, job.job), Outcome(_values(job.binding), tuple(losses))

    def references(self, case: Case, pieces: Pieces) -> References:
        key = (case.parts, case.schedule, pieces)
        if key not in self._references:
            self._references[key] = self._make_references(case, pieces)
        return self._references[key]

    def _make_references(self, case: Case, pieces: Pieces) -> References:
        split, rounded = self._reference(case, SplitTrainer), self.family.optimizer in zoo.ROUNDED
        whole = None if self.entry.mixes else self._reference(case, WholeTrainer)
        others = [] if whole is None else [whole]
        exact = None if rounded or pieces.sizes else split
        if pieces.sizes or rounded:
            others += [self._reference(case, partial(SplitTrainer, nudge=n)) for n in _nudges(self.dtype)]
        if pieces.sizes and pieces.of_clip_alone and not rounded:
            exact = self._reference(case, partial(SplitTrainer, sizes=dict(pieces.sizes)))
            others.append(exact)
        return References(split, whole, exact, _floors(split, others))

    def prepare(self, case: Case, batch: tuple, hypers: Mapping[str, float]) -> Prepared:
        """A lowered step, from a capture that other cases may have made."""
        shape = tuple(batch[0].shape)
        captured = self._capture(shape, batch, hypers)
        key = (id(captured), case.plan, len(case.parts), case.servers)
        if key not in self._prepared:
            self._prepared[key] = Prepared(captured, lower(captured.program, self._plan(case)), compiled=False)
        return self._prepared[key]

    def _plan(self, case: Case) -> Plan:
        """Made from the first capture, as a job makes it."""
        return plan_for(self.captured[0][1].program, case.plan, len(case.parts), case.servers)

    def _capture(self, shape: tuple[int, ...], batch: tuple, hypers: Mapping[str, float]) -> Captured:
        for known, captured in self.captured:
            if known == shape and all(g.holds(hypers) for g in captured.program.guards):
                return captured
        model, optimizer = self._objects()
        captured = capture_step(self.step, Binding(model, optimizer), optimizer, batch)
        self.captured.append((shape, captured))
        return captured

    def _objects(self) -> tuple[nn.Module, zoo.OptimizerTree]:
        return zoo.make_model(self.family.model, self.family.optimizer, self.dtype)

    def _batches(self, case: Case) -> Iterator[list[zoo.Batch]]:
        for x, y in zoo.make_batches(self.family.model, self.dtype, sum(case.parts), STEPS):
            yield list(zip(x.split(case.parts), y.split(case.parts), strict=True))

    def _reference(self, case: Case, kind: Callable[..., SplitTrainer | WholeTrainer]) -> Outcome:
        model, optimizer = self._objects()
        trainer = kind(self.step, model, optimizer, case.parts)
        with _scheduled(optimizer, case.schedule) as advance:
            losses = []
            for parts in self._batches(case):
                losses.append(trainer.step(parts))
                advance()
        return Outcome(_values(Binding(model, optimizer)), tuple(losses))


class _SharedPrograms(Programs):
    """The cache of one job, filled from the laboratory's."""

    def __init__(self, laboratory: Laboratory, case: Case, step, binding: Binding, optimizer):
        super().__init__(step, binding, optimizer, lambda _: laboratory._plan(case))
        self._laboratory, self._case = laboratory, case

    def _prepare(self, given: Given) -> Prepared:
        return self._laboratory.prepare(self._case, given.batch, self._binding.hyper_values())


class SplitTrainer:
    """The N parts one after another from the same values, each with its trainer's random stream; one update."""

    def __init__(self, step: zoo.Step, model: nn.Module, optimizer: zoo.OptimizerTree, parts, nudge=1.0, sizes=None):
        self.user_step, self.model, self.optimizer = step, model, optimizer
        self.nudge, self.sizes = nudge, sizes or {}
        self.nominal = parts[0] or 1
        self.streams = [random_stream(k) for k in range(len(parts))]

    def step(self, parts: Sequence[zoo.Batch]) -> torch.Tensor:
        weights = [len(x) / self.nominal for x, _ in parts]
        before = {name: b.clone() for name, b in self.model.named_buffers()}
        kept: list[tuple[float, torch.Tensor, Values, Values]] = []
        for rank, (part, weight) in enumerate(zip(parts, weights, strict=True)):
            if weight:
                self._load_buffers(before)
                kept.append((weight, *self._gradients(rank, part)))
        mean = _mean_of([weight for weight, *_ in kept], len(parts), self._wide())
        for name, parameter in self.model.named_parameters():
            given = [gradients[name] for _, _, gradients, _ in kept if name in gradients]
            parameter.grad = mean(given).mul_(self.nudge) if given else None
        after = {name: [b[name] for *_, b in kept] for name in before}
        unwritten = {n: before[n] for n, given in after.items() if not _written(given, before[n])}
        self._load_buffers({n: mean(given) if given[0].is_floating_point() else given[0] for n, given in after.items()})
        if not weights[0]:
            self._load_buffers(before | {n: b for n, b in self.model.named_buffers() if b.is_floating_point()})
        for name, value in unwritten.items():
            self.model.get_buffer(name).copy_(value)
        self.user_step.update(self.model, self.optimizer, self.sizes)
        return mean([loss for _, loss, *_ in kept])

    def _gradients(self, rank: int, part: zoo.Batch) -> tuple[torch.Tensor, Values, Values]:
        with self._stream(rank):
            loss = self.user_step.gradients(self.model, self.optimizer, *part).detach()
        gradients = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        return loss, gradients, {n: b.clone() for n, b in self.model.named_buffers()}

    @contextmanager
    def _stream(self, rank: int) -> Iterator[None]:
        outside = torch.get_rng_state()
        torch.set_rng_state(self.streams[rank])
        yield
        self.streams[rank] = torch.get_rng_state()
        torch.set_rng_state(outside)

    def _load_buffers(self, values: Values) -> None:
        for name, buffer in self.model.named_buffers():
            buffer.copy_(values[name])

    def _wide(self) -> torch.dtype:
        wide = any(p.dtype is torch.float64 for p in self.model.parameters())
        return torch.float64 if wide else torch.float32


class WholeTrainer:
    """The concatenated batch at once."""

    def __init__(self, step: zoo.Step, model: nn.Module, optimizer: zoo.OptimizerTree, parts):
        self.user_step, self.model, self.optimizer = step, model, optimizer

    def step(self, parts: Sequence[zoo.Batch]) -> torch.Tensor:
        x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return self.user_step(self.model, self.optimizer, x, y).detach()


def _nudges(dtype: torch.dtype) -> list[float]:
    eps = torch.finfo(dtype).eps
    return [1 + eps, 1 - eps, 1 + 2 * eps]


def _floors(split: Outcome, others: Sequence[Outcome]) -> Mapping[str, float]:
    """Taken both ways: a job's difference is relative to the reference that it is compared with."""
    pairs = [(split.all(), other.all()) for other in others]
    found = [differences(*way) for a, b in pairs for way in ((a, b), (b, a))]
    return {name: max((each[name] for each in found), default=0.0) for name in split.all()}


def _written(given: Sequence[torch.Tensor], before: torch.Tensor) -> bool:
    return any(not torch.equal(value, before) for value in given)


def _mean_of(weights: list[float], trainers: int, wide: torch.dtype) -> Mean:
    """The weighted mean of SEMANTICS section 1: scaled by weight / trainers, added in order, divided."""
    if trainers == 1:
        return lambda values: values[0].clone()
    total = reduce(torch.add, [torch.tensor(w, dtype=wide) for w in weights]) / trainers

    def mean(values: list[torch.Tensor]) -> torch.Tensor:
        scaled = [value * (weight / trainers) for value, weight in zip(values, weights, strict=True)]
        return reduce(torch.add, scaled) / total

    return mean


def plan_for(program: Program, plan: str, trainers: int, servers: int) -> Plan:
    """A named strategy with the options that the matrix uses."""
    return make_plan(named(plan, plan_variables(program), **PLANS[plan]), program, trainers, servers)


def combined_pieces(program: Program, job: Job) -> Pieces:
    """Which variables have a part in a global value (a clip norm) that is put together from their pieces."""
    updates = find_updates(program)
    parts = [(j, n, name) for j in updates.joins for n, name in j.partials.items()]
    combined = [
        (join, name)
        for join, node, name in parts
        if len(_sizes(program, job, name)) > 1 and not isinstance(updates.meanings[node], Scalar)
    ]
    sizes = {name: _sizes(program, job, name) for _, name in combined}
    return Pieces(tuple(sizes.items()), all(len(join.parameters) > 1 for join, _ in combined))


def _sizes(program: Program, job: Job, name: str) -> tuple[int, ...]:
    """Of the pieces of a variable: rows on servers, or elements with zeros behind on trainers."""
    sharing = job.plan.sharing(name)
    if not isinstance(sharing.sync, Shard):
        return sharing.sizes
    own = Own(name, program.variables[name].shape, job.plan.trainers)
    return (own.count,) * own.trainers


def combines_pieces(program: Program, job: Job) -> bool:
    """Whether a job equals the split reference only up to rounding, because it combines norms of pieces."""
    return bool(combined_pieces(program, job).sizes)


def judge(case: Case, outcome: Outcome, references: References) -> Verdict:
    """SEMANTICS section 0."""
    tolerance, floors, found = TOLERANCE[DTYPES[case.family.dtype]], references.floors, []
    if references.exact is not None:
        apart = differences(outcome.all(), references.exact.all())
        found += [Difference(name, value, 0.0, floors[name]) for name, value in apart.items()]
    for reference in [references.split] if references.whole is None else [references.split, references.whole]:
        apart = differences(outcome.all(), reference.all())
        found += [Difference(name, v, max(tolerance, 3 * floors[name]), floors[name]) for name, v in apart.items()]
    worst = max(found, key=lambda d: (d.share, d.found))
    failure = "" if worst.found <= worst.limit else _failure(worst)
    return Verdict(case, references.exact is not None, worst, failure)


def _failure(worst: Difference) -> str:
    expected = f"at most {worst.limit:.2e} (floor {worst.floor:.2e})" if worst.limit else "bit-equality"
    return f"{worst.variable} is {worst.found:.2e} from the reference; expected {expected}"


def differences(a: Values, b: Values) -> dict[str, float]:
    """Per variable max|a-b| / max|b|. Both must have the same variables."""
    assert a.keys() == b.keys(), f"variables differ: {sorted(a.keys() ^ b.keys())}"
    return {name: relative(a[name], b[name]) for name in a}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape, f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}"
    assert a.dtype == b.dtype, f"dtypes differ: {a.dtype} and {b.dtype}"
    if torch.equal(a, b):
        return 0.0
    scale = b.double().abs().max().item()
    apart = (a.double() - b.double()).abs().max().item()
    return apart / scale if scale and apart == apart else float("inf")


def check_replicas(job: Loopback) -> None:
    """Replicas are bit-equal after every synchronous step."""
    for a, b in pairwise(job.replicas):
        own = variables_of(job.job.trainer["step"].variables)  # type: ignore[union-attr]
        for name, value in [pair for pair in a.values.items() if pair[0] not in own]:
            other = b.values[name]
            same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
            assert same, f"'{name}' differs between trainers {a.rank} and {b.rank}"


def _values(binding: Binding) -> Values:
    kept = (Role.PARAM, Role.BUFFER, Role.STATE)
    wanted = {v.name for v in binding.variables.values() if v.role in kept}
    return {n: torch.as_tensor(v).detach().clone() for n, v in binding.values().items() if n in wanted}


@contextmanager
def _scheduled(optimizer: zoo.OptimizerTree, schedule: bool):
    """Gives what is called after each step."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
        schedules = zoo.make_schedules(optimizer) if schedule else []
        yield lambda: [each.step() for each in schedules]


@dataclass(slots=True)
class Laboratories:
    """One laboratory per family; the newest only, so that memory stays bounded. Changes with use."""

    kept: dict[Family, Laboratory] = field(default_factory=dict)

    def judge(self, case: Case) -> Verdict:
        if case.family not in self.kept:
            self.kept = {case.family: Laboratory(case.family)}
        return self.kept[case.family].judge(case)
