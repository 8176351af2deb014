"""The passes that turn a captured program into a whole program of what every role does, in the order in which they run.

A pass is one public function `name(program, plan) -> Program`, alone in its file.
"""

from collections.abc import Callable, Sequence

from syncwright.passes.accumulate import accumulate
from syncwright.passes.accumulate_parts import accumulate_parts
from syncwright.passes.average import average_gradients, average_values
from syncwright.passes.bucket import bucket
from syncwright.passes.bucket_delayed import bucket_delayed
from syncwright.passes.bucket_parts import bucket_parts
from syncwright.passes.clip_per_trainer import clip_per_trainer
from syncwright.passes.compact_lookups import compact_lookups
from syncwright.passes.compensate import compensate
from syncwright.passes.copy_on_host import copy_on_host
from syncwright.passes.delay import delay
from syncwright.passes.flatten import flatten
from syncwright.passes.gather_compressed import gather_compressed
from syncwright.passes.gather_rows import gather_rows
from syncwright.passes.join_served import join_served
from syncwright.passes.join_tables import join_tables
from syncwright.passes.keep_unsent import keep_unsent
from syncwright.passes.merge_on_host import merge_on_host
from syncwright.passes.note_lookups import note_lookups
from syncwright.passes.only_accumulate import only_accumulate
from syncwright.passes.power_sgd import power_sgd
from syncwright.passes.recompute import recompute
from syncwright.passes.reduce_by_node import reduce_by_node
from syncwright.passes.serve_parameters import serve_parameters
from syncwright.passes.shard_parameters import shard_parameters
from syncwright.passes.share_globals import share_globals
from syncwright.passes.sync_batch_norm import sync_batch_norm
from syncwright.passes.tidy import tidy
from syncwright.plan import Plan
from syncwright.program import Program

Pass = Callable[[Program, Plan], Program]

_PLACING = (
    *(accumulate, sync_batch_norm, clip_per_trainer, join_tables, compact_lookups, note_lookups, shard_parameters),
    *(accumulate_parts, join_served, serve_parameters, compensate, share_globals, merge_on_host, copy_on_host),
)
_SENDING = (
    *(gather_rows, power_sgd, gather_compressed, average_gradients, average_values, delay),
    *(keep_unsent, bucket_delayed, bucket, bucket_parts, recompute),
)

PIPELINE = (*_PLACING, *_SENDING, reduce_by_node, tidy)
COMPILED = (*_PLACING, *_SENDING, flatten, reduce_by_node, tidy)
_BEHIND_SENDING = (delay, keep_unsent, bucket_delayed, bucket, bucket_parts, recompute, flatten, reduce_by_node, tidy)


def between(passes: Sequence[Pass]) -> tuple[Pass, ...]:
    """The passes for calls that only accumulate: all that has been sent for the update is left out before values are joined."""
    place = next(at for at, each in enumerate(passes) if each in _BEHIND_SENDING)
    return (*passes[:place], only_accumulate, *passes[place:])


JOINING = ("bucket", "bucket_delayed", "bucket_parts", "join_served", "join_tables")
"""Passes without which every variable's communication stands alone, as a table of variables shows it."""
