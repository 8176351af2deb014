"""Sync: the ways in which a variable is shared. To add one, add a dataclass here and a pass for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

import torch

from syncwright.errors import PlanError
from syncwright.plan.compression import Compression, ErrorFeedback, Int8, PowerSGD, TopK, gathered_as
from syncwright.plan.outer import Geo, Mean, Outer
from syncwright.plan.partition import Partition, Whole
from syncwright.plan.placement import Placement, RoundRobin
from syncwright.typed import RARE, Amount, Count, Index, check_fields, tag

_WHOLE, _IN_TURN, _MEAN = Whole(), RoundRobin(), Mean()
Wire = Literal["float16", "bfloat16", "float32"]
Over = Literal["all", "node"] | tuple[Index | tuple[Index, ...], ...]


@dataclass(frozen=True, slots=True)
class Local:
    """Every trainer keeps a copy of its own and updates it with its own gradient."""


@dataclass(frozen=True, slots=True)
class AllReduce:
    """Every trainer keeps a replica; gradients are all-reduced, the update runs on every trainer.

    bucket_mb  megabytes (2**20 bytes) of gradients that one collective joins; 0: one collective per variable
    reduce     "mean": weighted by examples; "sum": for losses that are sums
    compress   what gradients are made of before they are reduced; None: they travel as they are
    over       whose gradients are reduced together: those of "all"; of the trainers of one host ("node"); of these trainers,
               and every other has a copy of its own ((0, 1)); of the trainers of each of several groups (((0, 1), (2, 3)))
    hierarchical  trainers of one host reduce first, then hosts among each other: equal to the flat sum but for its order
    piece_mb   megabytes above which a gradient is cut along its first axis into pieces of whole rows of at most so many, each
               reduced by itself; None: it travels whole
    delay      1: the gradient of a step is applied by the next one, and so is on its way while that computes

    Raises PlanError for settings that mean nothing together.
    """

    bucket_mb: Amount = 25.0
    reduce: Literal["mean", "sum"] = "mean"
    compress: Compression | None = field(default=None, metadata=RARE)
    over: Over = field(default="all", metadata=RARE)
    hierarchical: bool = field(default=False, metadata=RARE)
    piece_mb: Amount | None = field(default=None, metadata=RARE)
    delay: Literal[0, 1] = field(default=0, metadata=RARE)

    def __post_init__(self) -> None:
        if isinstance(self.over, list | tuple):
            object.__setattr__(self, "over", _frozen(self.over))
        check_fields(self, PlanError)
        if not isinstance(self.over, str):
            _check_lists(self.over)
        found = "hierarchical: true" if self.hierarchical else f"over: {shown(self.over)}"
        if self.hierarchical and self.over != "all":
            raise PlanError(
                f"AllReduce: found hierarchical: true with over: {shown(self.over)}, but it is a way for gradients of all "
                "trainers. Leave hierarchical or over out."
            )
        if (self.hierarchical or self.over != "all") and (by := gathered_as(self.compress)) is not None:
            raise PlanError(
                f"AllReduce: found {found} with compress: {tag(type(by))}, but what that sends cannot be added up on the way: "
                f"all trainers gather it from all. Compress by cast, or leave {found.partition(':')[0]} out."
            )
        if self.piece_mb is not None and isinstance(self.compress, PowerSGD | TopK | Int8 | ErrorFeedback):
            raise PlanError(
                f"AllReduce: found piece_mb: {self.piece_mb:g} with compress: {tag(type(self.compress))}, which makes of a "
                "gradient what is of all of it. Leave piece_mb out, or compress by cast."
            )
        if self.delay and (self.hierarchical or self.over != "all" or self.piece_mb is not None):
            found = found if self.piece_mb is None else f"piece_mb: {self.piece_mb:g}"
            raise PlanError(
                f"AllReduce: found delay: 1 with {found}, but only whole sums over all trainers come one step late. Leave one of "
                "both out."
            )
        by = self.compress if isinstance(self.compress, PowerSGD) else gathered_as(self.compress)
        if self.delay and by is not None:
            raise PlanError(
                f"AllReduce: found delay: 1 with compress: {tag(type(by))}, but only sums come one step late, and what this "
                "sends is gathered, or made of an earlier sum. Compress by cast or error_feedback of one, or leave delay out."
            )


def _frozen(over: Sequence) -> tuple:
    return tuple(tuple(each) if isinstance(each, list) else each for each in over)


def _check_lists(over: tuple) -> None:
    """Groups are apart, and have somebody."""
    flat = [each for each in over if isinstance(each, int)]
    if (flat and len(flat) < len(over)) or not over or () in over:
        raise PlanError(
            f"AllReduce.over: found {shown(over)}, expected trainers ([0, 1]) or groups of them ([[0, 1], [2, 3]]), each of at "
            "least one. Write one of both."
        )
    named = flat or [trainer for each in over for trainer in each]
    twice = next((trainer for trainer in named if named.count(trainer) > 1), None)
    if twice is not None:
        raise PlanError(
            f"AllReduce.over: found trainer {twice} more than once in {shown(over)}, expected each in one group at most: it has "
            "one copy of the variable. Name it once."
        )


def shown(over: Over) -> str:
    """As it is written in YAML."""
    return over if isinstance(over, str) else str([list(e) if isinstance(e, tuple) else e for e in over])


@dataclass(frozen=True, slots=True)
class AllGather:
    """Of tables: every trainer keeps a replica; the rows of the gradient that a batch touches go to all, who merge and update.

    reduce  "mean": weighted by examples; "sum": for losses that are sums; "mean_by_touch": each row's sum over the trainers
            that touched it
    lazy    an update writes the rows that a batch touched, also where an exact one would write all
    """

    reduce: Literal["mean", "sum", "mean_by_touch"] = "mean"
    lazy: bool = field(default=False, metadata=RARE)

    def __post_init__(self) -> None:
        check_fields(self, PlanError)


@dataclass(frozen=True, slots=True)
class ParameterServer:
    """Servers keep the variable and run its update: trainers push gradients and pull the value.

    mode        "sync": one update per step, when all live trainers have pushed; "async": one for each push, on arrival
    staleness   async: a step returns only when no live trainer is more than so many steps behind; None: never waits
    take        async: one update for so many pushes, with their mean, whoever sent them
    compensate  async: delay compensation, gradient + compensate * gradient**2 * (value - value that was pulled) (DC-ASGD)
    merge       async: up to so many gradients of a trainer travel as one push, their mean, while an earlier one is under way;
                steps read the value that has come last, and wait only when so many are held back
    staged      sync: steps read values that are one step old, so that pulls never wait
    prefetch    of tables: rows of the next step are asked for while this one runs; in step they are still exact
    replicated  every trainer keeps a copy, which is brought up to date when a step ends, and not when the next one reads it
    merge_on_host  trainers of one host add their gradients up, and one of them pushes the sum: to a server, a host is then as one
                trainer that has the examples of all
    copy_on_host  one trainer of each host pulls the value, and the others of its host take it from there
    device      where servers keep it, with its state: "cuda", "cuda:1"; None: in host memory
    push, pull  dtype in which gradients and values travel; None: their own
    bucket_mb   megabytes (2**20 bytes) of small variables of one server that travel and are updated together; 0: each alone
    partition   how the variable is cut along axis 0
    place       which server keeps each piece
    reduce      "mean": weighted by examples; "sum": for losses that are sums; of tables also "mean_by_touch": each row's sum
                over the trainers that touched it
    clock       async: what counts the schedule's steps. "trainer_step": the numbers that the trainer's scheduler has set travel
                with its push; "global_update": the server ticks a copy of it, once for as many pushes as there are trainers
    lazy        of tables: an update writes the rows that a batch touched, also where an exact one would write all

    Raises PlanError for settings that mean nothing together.
    """

    mode: Literal["sync", "async"] = "sync"
    partition: Partition = _WHOLE
    place: Placement = _IN_TURN
    reduce: Literal["mean", "sum", "mean_by_touch"] = "mean"
    staleness: Index | None = field(default=None, metadata=RARE)
    take: Count = field(default=1, metadata=RARE)
    compensate: Amount = field(default=0.0, metadata=RARE)
    merge: Count = field(default=1, metadata=RARE)
    staged: bool = field(default=False, metadata=RARE)
    clock: Literal["trainer_step", "global_update"] = field(default="trainer_step", metadata=RARE)
    lazy: bool = field(default=False, metadata=RARE)
    prefetch: bool = field(default=True, metadata=RARE)
    bucket_mb: Amount = field(default=4.0, metadata=RARE)
    replicated: bool = field(default=False, metadata=RARE)
    merge_on_host: bool = field(default=False, metadata=RARE)
    copy_on_host: bool = field(default=False, metadata=RARE)
    device: str | None = field(default=None, metadata=RARE)
    push: Wire | None = field(default=None, metadata=RARE)
    pull: Wire | None = field(default=None, metadata=RARE)

    def __post_init__(self) -> None:
        check_fields(self, PlanError)
        changed = {each.name for each in fields(self) if getattr(self, each.name) != each.default}
        if self.mode == "sync":
            for name in [name for name in _ASYNC if name in changed]:
                found = f"{name}: {getattr(self, name)} with mode: sync"
                raise self._refused(found, _ASYNC[name], "Say mode: async as well.")
        elif self.staged:
            why = "asynchronous pulls never wait, so nothing is gained"
            raise self._refused("staged: true with mode: async", why, "Leave staged out.")
        for first, second, why in _APART:
            if {first, second} <= changed:
                raise self._refused(f"{first} and {second} together", why, f"Leave {first} or {second} out.")

        if self.device is not None:
            _check_device(self.device)

    @property
    def in_step(self) -> bool:
        """Whether all trainers are at the same step when the variable is updated."""
        return self.mode == "sync"

    @property
    def ticks(self) -> bool:
        """Whether servers tick the scheduler."""
        return self.clock == "global_update"

    def _refused(self, found: str, why: str, do: str) -> PlanError:
        return PlanError(f"ParameterServer: found {found}, but {why}. {do}")


_ASYNC = {
    "staleness": "in lock step no trainer is ahead",
    "take": "a synchronous update takes one push of every trainer",
    "compensate": "in lock step no value is stale",
    "merge": "a synchronous update takes one push of every trainer in every step",
    "clock": "in lock step a step of all trainers is one update",
}
"""Settings that only asynchronous updates have, and why."""

_APART = (
    ("staleness", "merge", "a merged push comes some steps late, so the bound would not hold"),
    ("compensate", "take", "a mean of gradients has no one value that was pulled"),
    ("replicated", "staged", "a copy that is brought up to date is not one step old"),
    ("replicated", "merge", "steps then read the value that has come last, and wait for none"),
    ("compensate", "merge", "a mean of gradients has no one value that was pulled"),
    ("merge_on_host", "compensate", "the gradients of a host's trainers have no one value that was pulled"),
    ("merge_on_host", "merge", "a push that is held back would hold back those of all trainers of its host"),
    ("copy_on_host", "compensate", "a server does not know which value a trainer has that did not pull it"),
    ("copy_on_host", "merge", "steps then read the value that has come last to each trainer, and wait for none"),
    ("copy_on_host", "replicated", "each trainer brings its copy up to date when its own step ends"),
    (
        "merge_on_host",
        "staleness",
        "clocks count what each trainer has pushed, and one of a host pushes for the others",
    ),
)

_ALL_REDUCE = AllReduce()


@dataclass(frozen=True, slots=True)
class Shard:
    """Trainers cut the variable evenly among them, each updates its own part (ZeRO, Rajbhandari et al., SC 2020).

    A variable is laid out flat and cut into as many parts of one size as there are trainers, with zeros behind its last
    element. Gradients are reduce-scattered where they are complete: each trainer gets the mean of its own part. What cannot be
    cut, as its update needs the whole tensor (Muon, Adafactor), one trainer keeps whole: gradients are reduced to it, and it
    gives the others what the update made.

    stage      1, 2: every trainer keeps the whole parameter, and its own part of the optimizer's state; updated parts are
               gathered after the update. 3: of the parameter too it keeps its own part; the whole is gathered where forward
               reads it, and again where backward does
    bucket_mb  megabytes (2**20 bytes) of variables that one collective joins; 0: one collective per variable
    prefetch   stage 3: so many buckets are gathered ahead of the one that is read
    keep       stage 3: what forward has gathered is kept until backward has read it, and not gathered again
    owner      which trainer keeps a variable that cannot be cut: the one with the fewest elements of such so far
               ("least_loaded"), or the next one as soon as those before it have their share of the elements, in order of
               first use ("use_order")
    reduce     "mean": weighted by examples; "sum": for losses that are sums
    compress   what gradients are made of before they are reduced; None: they travel as they are
    within     whom it is cut among: "all" trainers, or those of a "node", of which each has all of it (hybrid: FSDP's
               HYBRID_SHARD); then parts are gathered inside a host, and what the owners of one part have of its gradient is
               all-reduced across hosts, which all have as many trainers

    Raises PlanError for settings that mean nothing together.
    """

    stage: Literal[1, 2, 3] = 3
    bucket_mb: Amount = 25.0
    prefetch: Index = field(default=1, metadata=RARE)
    keep: bool = field(default=False, metadata=RARE)
    owner: Literal["least_loaded", "use_order"] = field(default="least_loaded", metadata=RARE)
    reduce: Literal["mean", "sum"] = field(default="mean", metadata=RARE)
    compress: Compression | None = field(default=None, metadata=RARE)
    within: Literal["all", "node"] = field(default="all", metadata=RARE)

    def __post_init__(self) -> None:
        check_fields(self, PlanError)
        if self.keep and self.stage != 3:
            raise PlanError(
                f"Shard: found keep: true with stage: {self.stage}, but every trainer keeps the whole parameter then. Say "
                "stage: 3 as well, or leave keep out."
            )
        if isinstance(self.compress, PowerSGD):
            raise PlanError(
                "Shard: found compress: power_sgd, but factors are of a whole matrix, and a trainer gets its own part of one. "
                "Share the variable by all_reduce, or compress by cast or error_feedback."
            )
        if (by := gathered_as(self.compress)) is not None:
            raise PlanError(
                f"Shard: found compress: {tag(type(by))}, but what it sends cannot be added up on the way, so every trainer "
                "would get all of it and not its own part of the sum. Share the variable by all_reduce, or compress by cast."
            )


def _check_device(name: str) -> None:
    """Whether a machine may have such a device; its server looks whether it is there."""
    try:
        keeps = torch.device(name).type != "meta"
    except RuntimeError:
        keeps = False
    if not keeps:
        raise PlanError(
            f"ParameterServer.device: found {name!r}, expected a device that keeps values, as torch calls it. Write one such as "
            "cuda or cuda:1, or leave it out for host memory."
        )


@dataclass(frozen=True, slots=True)
class LocalSteps:
    """Every trainer runs the whole update on its own gradient; every k-th step they exchange what they have come to.

    every  the steps between two exchanges
    outer  what an exchange makes of it: the mean, the update of an outer optimizer, or (geo) each trainer's own difference
    start  the first step that a trainer takes alone; until then gradients are all-reduced
    over   how the differences travel: all_reduce, where every trainer runs the outer update, or parameter_server, where
           servers keep what all had after the last exchange and the outer optimizer's state

    Raises PlanError for settings that mean nothing together.
    """

    every: Count
    outer: Outer = _MEAN
    start: Index = 0
    over: AllReduce | ParameterServer = _ALL_REDUCE

    def __post_init__(self) -> None:
        check_fields(self, PlanError)
        if isinstance(self.over, ParameterServer):
            self._check_servers(self.over)
            return
        if self.over.over != "all":
            raise PlanError(
                f"LocalSteps.over: found all_reduce with over: {shown(self.over.over)}, but all trainers take part in an "
                "exchange. Take it out."
            )
        if self.over.delay:
            raise PlanError(
                "LocalSteps.over: found all_reduce with delay: 1, but an exchange is waited for where it is made: trainers go on "
                "from what it gives. Leave delay out."
            )
        top = gathered_as(self.over.compress)
        if isinstance(top, TopK) and (top.momentum or top.warmup_steps):
            name = "momentum" if top.momentum else "warmup_steps"
            raise PlanError(
                f"LocalSteps.over: found all_reduce with compress: top_k and {name}: {getattr(top, name):g}, but what is "
                f"exchanged is no gradient, and comes every few steps. Leave {name} out of top_k."
            )
        if self.is_geo:
            raise PlanError(
                "LocalSteps.outer: found geo over all_reduce, expected it over parameter_server: a server adds each trainer's "
                "difference as it comes, and nobody waits for the others. Say over: parameter_server as well."
            )

    @property
    def is_geo(self) -> bool:
        """Whether nobody waits for the others."""
        return isinstance(self.outer, Geo)

    def _check_servers(self, over: ParameterServer) -> None:
        meant = {"bucket_mb", "partition", "place", *(("mode",) if self.is_geo else ("reduce",))}
        for each in fields(over):
            found = getattr(over, each.name)
            if each.name not in meant and found != each.default:
                raise PlanError(
                    f"LocalSteps.over: found parameter_server with {each.name}: {found}, expected no settings but "
                    f"{', '.join(sorted(meant))}: {_NOT_OF_STEPS.get(each.name, 'it is said of what travels in every step')}. "
                    "Take it out."
                )
        if over.reduce == "mean_by_touch":
            raise PlanError(
                "LocalSteps.over: found parameter_server with reduce: mean_by_touch, expected mean or sum: of differences no "
                "row is known to be touched. Take it out."
            )


_NOT_OF_STEPS = {
    "mode": "an exchange takes the difference of every trainer; with outer: geo servers add each as it comes",
    "reduce": "each difference is divided by the number of trainers",
}
"""Settings that servers of exchanges do not have, and why, where it is not the same for all."""

Collective = AllReduce | AllGather | Shard
"""Trainers keep the variable, and update it with what all have given in this step, by collectives."""

Sync = Local | AllReduce | AllGather | Shard | ParameterServer | LocalSteps


def served_by(sync: Sync) -> ParameterServer | None:
    """How servers keep a variable that is shared so; None where they do not."""
    match sync:
        case ParameterServer():
            return sync
        case LocalSteps(over=ParameterServer() as over):
            return over
    return None


def joins_hosts(sync: Sync) -> bool:
    """Whether trainers of one host push or pull together."""
    return isinstance(sync, ParameterServer) and (sync.merge_on_host or sync.copy_on_host)


def asks_for_hosts(sync: Sync) -> str:
    """The setting by which it matters who shares a host; nothing where it does not."""
    match sync:
        case ParameterServer() if joins_hosts(sync):
            return "merge_on_host or copy_on_host"
        case AllReduce(over="node"):
            return "over: node"
        case AllReduce(hierarchical=True) | LocalSteps(over=AllReduce(hierarchical=True)):
            return "hierarchical"
        case Shard(within="node"):
            return "within: node"
    return ""


def not_accumulated(sync: Sync, rows: bool) -> str | None:
    """Why the gradients of several calls cannot be one of a variable that is shared so; None where they can. `rows`: rows of it
    travel."""
    match sync:
        case LocalSteps(every=every):
            return (
                f"which trainers train alone for {every} steps: that says how often they meet, and accumulate how often they "
                "update; expected one of both"
            )
        case AllReduce(over=over) if over != "all":
            return f"which is reduced over: {shown(over)}; expected a mean over all trainers, in each call"
        case ParameterServer(mode="async") if rows:
            return "of which servers take rows as they come, from each call by itself; expected an update in step"
        case ParameterServer(reduce="mean_by_touch") | AllGather(reduce="mean_by_touch"):
            return "whose rows are divided by the trainers that touched them; expected a mean or a sum, which add up over calls"
    return None
