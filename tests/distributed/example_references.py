"""The jobs of test_example_jobs.py and example_matrix.py, and what they are compared with: one device, in plain PyTorch.

Every variant (a model and an optimizer) is compared as SEMANTICS section 0 says: to the bit with *split*, up to rounding with
*concatenated*.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, reduce
from pathlib import Path

import clicks
import flights
import invented_clicks
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from syncwright import ParameterServer
from syncwright.plan import Plan
from syncwright.runtime.sharding import part_of
from tests.distributed import example_job as job
from tests.distributed.example_job import Data, Setting
from tests.distributed.launching import launched
from tests.equivalence import relative

SCRIPT = Path(job.__file__)
ROOT = SCRIPT.parents[2]
SIZE = 24
TOLERANCE = 1e-5
NUDGES = tuple(1 + n * torch.finfo(torch.float32).eps for n in (1, -1, 2))
FEW = 3
"""Categories of each model in `make test`."""

Variant = tuple[str, str]


# --- the data -------------------------------------------------------------------------------------------


@cache
def data(categories: int = FEW) -> Data:
    """One real flight in twenty, shuffled, and an invented log of clicks with its first categories."""
    tables = flights.read_tables()
    prepared = flights.prepare(replace(tables, flights=tables.flights.iloc[::20].reset_index(drop=True)))
    columns = min(categories, len(flights.CATEGORIES))
    chosen = dict(list(prepared.rows.items())[:columns])
    order = torch.randperm(len(prepared.train.late), generator=torch.Generator().manual_seed(1))[: SIZE * job.STEPS]
    train = (prepared.train.ids[order, :columns], prepared.train.dense[order], prepared.train.late[order])
    held_out = (prepared.test.ids[:450, :columns], prepared.test.dense[:450], prepared.test.late[:450])
    with tempfile.TemporaryDirectory() as folder:
        text, parts = Path(folder) / "log.txt", Path(folder) / "parts"
        invented_clicks.write(text, SIZE * job.STEPS + 450)
        ((counts, ids, clicked),) = clicks.AllParts(clicks.convert([text], parts), SIZE * job.STEPS + 450)
    of_clicks = (counts, ids[:, :categories], clicked)
    rows = tuple(min(300, count) for count in clicks.CARDINALITIES[:categories])
    at = SIZE * job.STEPS
    return Data((*train, *(t[:at] for t in of_clicks)), (*held_out, *(t[at:] for t in of_clicks)), chosen, rows)


# --- one device -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a variant ends with: parameters and optimizer state by name, losses, and scores of what is held out."""

    values: Mapping[str, Tensor]
    losses: Tensor
    scores: Tensor


class OneDevice:
    """A variant in plain PyTorch: on the whole batch, or *split*: on its parts, with the mean of their gradients."""

    def __init__(self, found: Data, variant: Variant, trainers: int | None, nudge: float = 1.0):
        self.kind, self.name = variant
        self.data, self.trainers, self.nudge = found, trainers, nudge
        self.model, self.optimizers = job.build(found, [variant])

    def run(self) -> Outcome:
        losses = [self._step(batch) for batch in self.data.batches(SIZE)]
        with torch.no_grad():
            held_out = [self._score(part) for batch in held_out_batches(self.data) for part in self._parts(batch)]
        (inner,) = self._inner().children()
        return Outcome(values_of(inner, self.optimizers), torch.stack(losses), torch.cat(held_out))

    def _step(self, batch: job.Batch) -> Tensor:
        if self.trainers is None:
            return job.step(self.model, self.optimizers, *batch)[0].detach()
        weights, losses, gradients = [], [], []
        for part in self._parts(batch):
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            (logits,) = self.model.scores(part)
            loss = nn.functional.binary_cross_entropy_with_logits(logits, job.label(self.kind, part))
            loss.backward()
            weights.append(len(part[0]))
            losses.append(loss.detach())
            gradients.append([p.grad for p in self.model.parameters()])
        for parameter, given in zip(self.model.parameters(), zip(*gradients, strict=True), strict=True):
            parameter.grad = self._merged(given, weights)
        for optimizer in self.optimizers:
            optimizer.step()
        return self._mean(losses, weights)

    def _merged(self, given: Sequence[Tensor | None], weights: Sequence[int]) -> Tensor:
        """The mean. It is sparse for SparseAdam alone: for the others a row without a lookup is one with a gradient of zero, and
        torch's Adagrad rounds otherwise where gradients are sparse."""
        known = [g for g in given if g is not None]
        assert len(known) == len(given), "every parameter has a gradient"
        mean = self._mean([_dense(g) if g.is_sparse else g for g in known], weights) * self.nudge
        if self.name not in ("SparseAdam", "lazy reference") or not known[0].is_sparse:
            return mean
        touched = torch.cat([g._indices()[0] for g in known]).unique()
        return torch.sparse_coo_tensor(touched[None], mean[touched], mean.shape, is_coalesced=True)

    def _mean(self, values: Sequence[Tensor], weights: Sequence[int]) -> Tensor:
        """SEMANTICS section 1: scaled by n / (nominal N), added in order, divided by what the weights add up to."""
        nominal, trainers = len(self._parts(self.data.batches(SIZE)[0])[0][0]), len(values)
        of = [weight / nominal for weight in weights]
        total = reduce(torch.add, [torch.tensor(w) for w in of]) / trainers
        return reduce(torch.add, [v * (w / trainers) for v, w in zip(values, of, strict=True)]) / total

    def _parts(self, batch: job.Batch) -> list[job.Batch]:
        """In memory of their own, as in processes: how a matrix product adds up depends on where it begins."""
        if self.trainers is None:
            return [batch]
        parts = [part_of(batch, self.trainers, rank) for rank in range(self.trainers)]
        return [tuple(t.clone() for t in part) for part in parts]  # type: ignore[union-attr, attr-defined]

    def _score(self, part: job.Batch) -> Tensor:
        (found,) = job.score(self.model, *part)
        return found

    def _inner(self) -> nn.Module:
        return self.model.get_submodule(self.kind)


def _dense(gradient: Tensor) -> Tensor:
    """Rows added up in the order in which they were looked up."""
    return torch.zeros(gradient.shape).index_add_(0, gradient._indices()[0], gradient._values())


def held_out_batches(found: Data) -> list[job.Batch]:
    return [tuple(t[at : at + 100] for t in found.held_out) for at in range(0, len(found.held_out[0]), 100)]


def values_of(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Parameters, and optimizer state under the names of their parameters."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {name: parameter.detach().clone() for parameter, name in names.items()}
    for optimizer in optimizers:
        for parameter, held in optimizer.state.items():
            found |= {f"{names[parameter]} {key}": torch.as_tensor(value).clone() for key, value in held.items()}  # type: ignore[index]
    return {name: t.to_dense() if t.is_sparse else t for name, t in found.items()}


@cache
def one_device(variant: Variant, trainers: int | None, categories: int = FEW, nudge: float = 1.0) -> Outcome:
    """Of `trainers` parts, or (None) of the whole batch."""
    return OneDevice(data(categories), variant, trainers, nudge).run()


# --- jobs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ended:
    """A job's plan, the reports of its trainers, and the outcome of each variant on trainer 0."""

    plan: Plan
    reports: list[dict]
    outcomes: Mapping[Variant, Outcome]


def start(setting: Setting, folder: Path, categories: int = FEW) -> Ended:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'examples'}", "OMP_NUM_THREADS": "1"}
    torch.save((data(categories), setting, SIZE), folder / "job.pt")
    status = launched(str(SCRIPT), [str(folder)], setting.trainers, setting.servers, environment=environment)
    assert status == 0, f"the job ended with status {status}"
    reports = [torch.load(folder / f"{k}.pt", weights_only=False) for k in range(setting.trainers)]
    return Ended(Plan.from_yaml(reports[0]["plan"]), reports, outcomes(reports[0], data(categories), setting.variants))


def outcomes(report: Mapping, found: Data, variants: Sequence[Variant]) -> dict[Variant, Outcome]:
    model, optimizers = job.build(found, variants)
    model.load_state_dict(report["state"]["model"])
    of: dict[Variant, Outcome] = {}
    saved = iter(zip(optimizers, report["state"]["optimizer"], strict=True))
    for at, variant in enumerate(variants):
        inner = model.get_submodule(".".join(variant))
        mine = []
        for _ in job.optimizers_of(inner, *variant):
            optimizer, state = next(saved)
            optimizer.load_state_dict(state)
            mine.append(optimizer)
        losses = torch.stack([each[at] for each in report["losses"]])
        of[variant] = Outcome(values_of(inner, mine), losses, report["scores"][at])
    return of


# --- judgement ------------------------------------------------------------------------------------------


def reference_of(variant: Variant) -> Variant:
    """A lazy Adam is SparseAdam."""
    kind, name = variant
    return (kind, "lazy reference") if name == "lazy" else variant


def is_exact(setting: Setting, variant: Variant) -> bool:
    """Whether bit-equality with *split* is due: gradients are added in the order of trainers, by the same arithmetic."""
    in_order = setting.trainers <= 2 or isinstance(setting.dense, ParameterServer)
    return in_order and variant[1] != "lazy"


def apart(one: Outcome, other: Outcome) -> dict[str, float]:
    """Per variable, the largest difference relative to the largest value."""
    assert one.values.keys() == other.values.keys()
    found = {name: relative(one.values[name].float(), other.values[name].float()) for name in one.values}
    return found | {"losses": relative(one.losses, other.losses), "scores": relative(one.scores, other.scores)}


def floors(split: Outcome, others: Sequence[Outcome]) -> dict[str, float]:
    """How far plain PyTorch is from itself: *split* from *concatenated*, and (others) with gradients one rounding off."""
    found = [way for other in others for way in (apart(split, other), apart(other, split))]
    return {name: max(each[name] for each in found) for name in found[0]}


def differences(setting: Setting, ended: Ended, categories: int = FEW) -> list[str]:
    """What is farther from one device than it may be; empty where all is right."""
    return [line for variant in setting.variants for line in _differences(setting, ended, variant, categories)]


def _differences(setting: Setting, ended: Ended, variant: Variant, categories: int) -> list[str]:
    ours, reference = ended.outcomes[variant], reference_of(variant)
    split = one_device(reference, setting.trainers, categories)
    whole = one_device(reference, None, categories)
    exact = is_exact(setting, variant)
    nudged = [] if exact else [one_device(reference, setting.trainers, categories, nudge) for nudge in NUDGES]
    limits = {name: max(TOLERANCE, 3 * floor) for name, floor in floors(split, [whole, *nudged]).items()}
    of_split = dict.fromkeys(limits, 0.0) if exact else limits
    return [
        f"{'/'.join(variant)}: {name} is {value:.1e} from {of}; expected at most {most[name]:.1e}"
        for of, other, most in (("split", split, of_split), ("concatenated", whole, limits))
        for name, value in apart(ours, other).items()
        if not value <= most[name]
    ]


def auc(found: Data, kind: str, scores: Tensor) -> float:
    return float(roc_auc_score(job.label(kind, found.held_out).numpy(), scores.numpy()))
