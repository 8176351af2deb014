"""Evaluation: a function of model and batch, captured without gradients; its outputs, joined in the loader's order."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import MappingProxyType
from typing import cast

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from syncwright import ops
from syncwright.capture import Captured, capture_step
from syncwright.capture.state import Binding
from syncwright.dead import remove_dead
from syncwright.errors import BatchError
from syncwright.job import Job
from syncwright.passes.bucket_parts import bucket_parts
from syncwright.passes.compact_lookups import compacted
from syncwright.passes.gather_parameters import gather_parameters
from syncwright.passes.insert import before_first_use
from syncwright.program import Program, Role, Variable, set_results
from syncwright.runtime.executor import Blocked, Port
from syncwright.runtime.kept import Given, Kept
from syncwright.runtime.own_parts import apart_from
from syncwright.runtime.programs import INTERPRETED_FIRST, Busy, Warmings
from syncwright.runtime.sharding import bounds
from syncwright.shapes import Inference, mode_of
from syncwright.tree import tensors
from syncwright.verify import verify

aten = torch.ops.aten
Gather = Callable[[Sequence[torch.Tensor], str], list[torch.Tensor]]
Joined = Mapping[str, Sequence[Variable]]
Served = tuple[Mapping[str, Variable], Collection[str], Joined]
"""What servers hold, of which variables rows travel, and which stand for several."""


class Evaluated:
    """A function captured for batches of one shape. Changes with every run, until it is compiled."""

    def __init__(self, fn: Callable, captured: Captured, warming: Warmings, rows: int):
        self.fn, self._captured, self._warming = fn, captured, warming
        self._inputs = [v.name for v in captured.program.of_role(Role.INPUT)]
        self._gathers = any(node.target in (ops.gather_parts, ops.give) for node in warming.program.graph.nodes)
        self._check_rows(rows)

    @property
    def program(self) -> Program:
        """What was captured."""
        return self._captured.program

    @property
    def gathers(self) -> bool:
        """Whether all trainers take part, also those that have no example."""
        return self._gathers

    @property
    def structure(self) -> pytree.TreeSpec:
        """How the function's result is put together."""
        return self._captured.returned

    @torch.no_grad()
    def run(
        self, values: Mapping[str, object], batch: tuple, port: Port, trainer: int
    ) -> Generator[Blocked, None, list]:
        """The outputs for `batch` on a trainer; gives `Blocked` while a value from a server is not there."""
        leaves = tensors(batch)
        inputs = dict(zip(self._inputs, leaves, strict=True))
        executor = self._warming.executor(trainer)
        results = yield from executor.run({**values, **self._captured.constants, **inputs}, port)
        return [results[name] for name in self._captured.outputs]

    def nothing(self) -> list[torch.Tensor]:
        """The outputs for a part without examples."""
        forms = [self._captured.program.variables[name] for name in self._captured.outputs]
        return [torch.empty((0, *form.shape[1:]), dtype=form.dtype) for form in forms]

    def _check_rows(self, rows: int) -> None:
        for name in self._captured.outputs:
            shape = self._captured.program.variables[name].shape
            if shape[:1] != (rows,):
                raise BatchError(
                    f"evaluate: '{name}' of what {_called(self.fn)} returns has shape {list(shape)} for {rows} examples; "
                    f"expected one row per example, [{rows}, ...]. Return what belongs to each example; reduce what evaluate "
                    "gives back."
                )


class Evaluations:
    """Captured functions, by the function, the batch's shapes and the model's settings. Changes with every new one."""

    def __init__(self, binding: Binding, optimizer: object, compiles: Callable[[], bool], busy: Busy = nullcontext):
        self._binding, self._optimizer, self._compiles, self._busy = binding, optimizer, compiles, busy
        self._kept: Kept[Evaluated] = Kept()

    def for_batch(self, fn: Callable, batch: tuple, rows: int, job: Job | None) -> Evaluated:
        """`fn` for batches like this one, pulling what servers hold. Raises `CaptureError`, `BatchError`."""
        held, tables, joined = ({}, {}, {}) if job is None else (job.addressed, job.tables, job.joined)
        remote = () if job is None else job.unbounded
        given = Given.of(batch, self._binding, (_identity(fn), *held))
        found = self._kept.find(given)
        if found is None:
            found = self._captured(fn, batch, rows, (held, tables, joined), remote, job)
            self._kept.keep(given.key(found.program), found)
        return found

    def _captured(
        self, fn: Callable, batch: tuple, rows: int, served: Served, remote: Collection[str], job: Job | None
    ) -> Evaluated:
        with self._busy("capturing an evaluation"):
            step = _without_gradients(fn)
            captured = capture_step(step, self._binding, self._optimizer, batch, remote=remote)
            program = pulling(captured.program, captured.outputs, *served)
            if job is not None:
                program = bucket_parts(gather_parameters(program, apart_from(job.trainer["step"])), job.plan)
            verify(program)
        interpreted = INTERPRETED_FIRST if len(self._kept) else 0
        warming = Warmings(program, self._compiles(), interpreted, "an evaluation", self._busy)
        return Evaluated(fn, captured, warming, rows)


def pulling(
    program: Program,
    outputs: Sequence[str],
    held: Mapping[str, Variable],
    tables: Collection[str] = (),
    joined: Joined = MappingProxyType({}),
) -> Program:
    """Only the outputs are computed, from values that servers hold as they are now; of tables the rows that are looked up.

    before  %w = placeholder, %y = mm(%x, %w), output({"loss": %y, "mean": %m})               (w in two pieces on servers)
    after   %a = pull([], "w[0]"), %b = pull([], "w[1]"), %c = cat([%a, %b]), %y = mm(%x, %c), output({"loss": %y})
    """
    program = compacted(program, set(tables) & set(program.placeholders))
    program = program.edit()
    set_results(program, {name: node for name, node in program.results.items() if name in outputs})
    remove_dead(program.graph)
    known = Inference(mode_of(program.graph))
    pieces: dict[str, list[Variable]] = {}
    for variable in held.values():
        pieces.setdefault(variable.whole or variable.name, []).append(variable)
    for taken in program.graph.find_nodes(op="call_function", target=ops.take_rows):
        _pull_rows(program, taken, known)
    _pull_joined(program, held, joined, known)
    for name, node in program.placeholders.items():
        if name in pieces and node.users:
            _pull(program, node, pieces[name], known)
        if not node.users:
            program.graph.erase_node(node)
    used = {*program.placeholders, *program.results}
    return replace(program, variables={n: v for n, v in program.variables.items() if n in used})


def _pull(program: Program, node, pieces: list[Variable], known: Inference) -> None:
    if any(p.selection is not None and p.selection.shards for p in pieces):
        raise BatchError(
            f"evaluate: the function reads all of '{node.meta['variable']}', which servers keep by virtual shards; expected "
            "lookups of rows alone. Read it whole from the model after sync()."
        )
    parts = sorted((p for p in pieces if p.part is not None), key=lambda p: p.part or (0, 0)) or pieces[:1]
    users, graph = list(node.users), program.graph
    with before_first_use(users):
        pulled = [known.call(graph, ops.pull, [], p.name, list(p.shape), p.dtype) for p in parts]
        whole = pulled[0] if len(pulled) == 1 else known.call(graph, aten.cat.default, pulled)
    for user in users:
        user.replace_input_with(node, whole)


def _pull_joined(program: Program, held: Mapping[str, Variable], joined: Joined, known: Inference) -> None:
    """Variables that servers keep as parts of others are views of these."""
    graph = program.graph
    for name, parts in joined.items():
        read = [(p, program.placeholders[p.name]) for p in parts if p.name in program.placeholders]
        users = [user for _, node in read for user in node.users]
        if not users or name not in held:
            continue
        with before_first_use(users):
            form = held[name]
            flat = known.call(graph, ops.pull, [], name, list(form.shape), form.dtype)
            for part, node in read:
                view = flat
                if part.part is not None:
                    stretch = known.call(graph, aten.slice.Tensor, flat, 0, *part.part)
                    view = known.call(graph, aten.view.default, stretch, list(part.shape))
                node.replace_all_uses_with(view)


def _pull_rows(program: Program, taken: Node, known: Inference) -> None:
    table, ids = cast(tuple[Node, Node], taken.args)
    val = taken.meta["val"]
    with program.graph.inserting_before(taken):
        pulled = known.call(program.graph, ops.pull_rows, ids, table.meta["variable"], list(val.shape), val.dtype)
    taken.replace_all_uses_with(pulled)
    program.graph.erase_node(taken)


def _without_gradients(fn: Callable) -> Callable:
    """`fn` as a step that leaves the optimizer alone."""

    @functools.wraps(fn)
    def step(model: torch.nn.Module, optimizer: object, *batch: object) -> object:
        with torch.no_grad():
            return fn(model, *batch)

    return step


def _called(fn: Callable) -> str:
    return fn.__name__ if isinstance(fn, types.FunctionType) else f"a {type(fn).__name__}"


def _identity(fn: Callable) -> object:
    """Equal for a function that is defined anew by the same lines around the same values, as in a loop over epochs."""
    if not isinstance(fn, types.FunctionType):
        return fn
    closed = tuple(id(cell.cell_contents) for cell in fn.__closure__ or ())
    defaults = tuple(map(id, (*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values())))
    return fn.__code__, closed, defaults


class Rows:
    """What an evaluation has given so far: by trainer and batch, a list of outputs. Changes with every batch."""

    def __init__(self, trainers: int):
        self._trainers = trainers
        self._sizes: list[int] = []
        self._outputs: dict[int, list[list[torch.Tensor]]] = {}
        self.structure: pytree.TreeSpec | None = None

    def begin(self, size: int) -> None:
        """A batch of `size` examples."""
        self._sizes.append(size)

    def span(self, rank: int) -> slice:
        """Which examples of the latest batch are trainer `rank`'s."""
        return slice(*bounds(self._sizes[-1], self._trainers, rank))

    def add(self, rank: int, outputs: list[torch.Tensor]) -> None:
        """Trainer `rank`'s outputs for the latest batch."""
        self._outputs.setdefault(rank, []).append(outputs)

    def joined(self, gather: Gather | None) -> object:
        """All outputs in the loader's order, in the function's own structure; None where there were no batches."""
        if self.structure is None:
            return None
        columns = [
            [torch.cat([outputs[column] for outputs in mine]) for mine in self._outputs.values()]
            for column in range(self.structure.num_leaves)
        ]
        return self.structure.unflatten([c[0] if gather is None else self._in_order(c, gather) for c in columns])

    def _in_order(self, mine: list[torch.Tensor], gather: Gather) -> torch.Tensor:
        """Every trainer's rows; parts are padded to one length on the way."""
        counts = [
            [stop - start for start, stop in (bounds(size, self._trainers, rank) for size in self._sizes)]
            for rank in range(self._trainers)
        ]
        longest = max(sum(each) for each in counts)
        padded = [rows.new_zeros((longest, *rows.shape[1:])) for rows in mine]
        for whole, rows in zip(padded, mine, strict=True):
            whole[: len(rows)] = rows
        everyone = gather(padded, "the outputs of an evaluation")
        parts = [list(rows[: sum(each)].split(each)) for rows, each in zip(everyone, counts, strict=True)]
        return torch.cat([part for batch in zip(*parts, strict=True) for part in batch])
