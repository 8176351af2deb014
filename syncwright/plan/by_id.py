"""Tables whose rows are kept by the id's virtual shard: what rules mean for them, and for tables that nobody has counted."""

from __future__ import annotations

from dataclasses import replace

from syncwright.errors import PlanError
from syncwright.plan.partition import Hashed
from syncwright.plan.sync import ParameterServer, Sync
from syncwright.program import Variable

_HASHED = Hashed()


def on_servers(
    source: str, variable: Variable, sync: Sync, update: str | None, still: bool, notes: list[str]
) -> ParameterServer:
    """How a table of any 64-bit ids is shared: servers keep it by virtual shards.

    update  how its update may be split; None: it has none
    still   its update leaves rows alone that no lookup touches

    Raises PlanError: it is to be kept elsewhere; no optimizer trains it; it is read otherwise than by lookups; its update
    needs all of it, or would have to write every row in every step.
    """
    about = f"{source}: variable {variable.name!r}"
    if update is None:
        raise PlanError(
            f"{about}: found a HashEmbedding that makes rows while nothing trains it, expected an optimizer that updates it. "
            "Give its parameters to the optimizer, or call eval() on it to read the rows that it has."
        )
    if not isinstance(sync, ParameterServer):
        raise PlanError(
            f"{about}: found {type(sync).__name__} for a table that makes rows for ids as they come, expected ParameterServer: "
            "trainers that make rows of their own would not hold the same ones. Share it by parameter_server (with one "
            "trainer and no servers started, a server runs beside it), or use nn.Embedding."
        )
    if not variable.sparse:
        raise PlanError(
            f"{about}: found a table of ids that nobody has counted which is also read whole, expected lookups alone: nobody "
            "knows its rows. Take out what else reads it (a norm, a tied layer), or use nn.Embedding."
        )
    if update not in ("elementwise", "row-wise"):
        raise PlanError(
            f"{about}: found an update that needs the whole table, expected one that works row by row: nobody knows all rows "
            "of a table of any ids. Use SGD, Adagrad, RowWiseAdagrad or SparseAdam."
        )
    if not (still or sync.lazy):
        raise PlanError(
            f"{about}: found an update that moves rows that no lookup touches, expected one that leaves them: a table of ids "
            "that nobody has counted is not passed over in every step. Say lazy: true (untouched rows stay as they are), or "
            "use SGD, Adagrad, RowWiseAdagrad without momentum and decay, or SparseAdam."
        )
    if sync.device is not None:
        raise PlanError(
            f"{about}: found device: {sync.device} for a table of any ids, expected host memory, in which servers make rows. "
            "Leave it out for this variable."
        )
    shards = sync.partition if isinstance(sync.partition, Hashed) else _HASHED
    if sync.prefetch:
        notes.append(
            f"{variable.name}: rows are not asked for ahead, as which ids have one is known only behind the step before"
        )
    return replace(sync, partition=shards, prefetch=False)


def check_shards(source: str, variable: Variable, partition: Hashed, servers: int) -> None:
    """Raises PlanError where a server would be left without a shard."""
    if partition.shards < servers:
        raise PlanError(
            f"{source}: variable {variable.name!r}: found {partition.shards} virtual shards for {servers} servers, expected at "
            f"least one for each. Give it more, such as partition: {{hashed: 1024}}, and keep to that number: it is part of "
            "where a row lives."
        )
