"""Our operations in a graph: signature and shape rule of each. How they act is the executor's business.

    gradient(x, name)                      identity; here the gradient of parameter `name` is complete

Of tables, of which a step reads few rows. Ids are any 64-bit numbers:

    unique(ids, padding)                   the distinct ids, in any order, with the last one again and again behind them, to as
                                           many as are given (see `kernels.distinct`); then for each tensor of ids the places of
                                           its ids among them. `padding` from 0 on: this id comes first, in one more place,
                                           whether it is given or not
    join_ids(ids, rows, names)             the ids of several tables, of so many rows each, in the table in which one's rows
                                           are below another's; one table's behind another's, flat. `IndexError` for an id
                                           that its table does not have, by the tables' names
    join_offsets(offsets, ids)             where bags begin among the ids that join_ids gives
    take_rows(x, ids)                      these rows of x
    add_rows(x, places, rows)              `rows` rows of zeros, to which rows of x are added, one for each place, in order
    dense_rows(x, ids, rows, skip)         `rows` rows of zeros, to which each row of x but the first `skip` is added where its
                                           id says; the distinct ones only
    own_rows(x, ids, skip)                 the distinct ids but for the first `skip`, and x's rows of these
    largest(x, count)                      where so many elements of x, laid out flat, are: those of the largest magnitude (in
                                           float32; of equal ones the first), in order, as int32
    add_elements(x, places, parts, count)  `count` zeros, to which x is added where the places say: part by part, of so many
                                           parts of one size, in each of which no place comes twice
    put_rows(x, ids, rows)                 x, with these rows in place of its own. Where nothing reads x afterwards, a run
                                           writes them into x itself

In a whole program, which holds what every role does (see `place`); each names its channel, runs where its result is
read, and its result is what is read there:

    push.merged(x, channel, merge, take, up_to, dtype, weight)
                                           from trainers to servers: the trainers' contributions, merged, in `dtype`: one of
                                           each trainer (take 0), or so many as they come; up to so many of one trainer
                                           travel as one. With a `weight` (a tensor of one element), one of each host
    pull.value(x, channel, when, dtype, on_host)
                                           from a server to every trainer, in `dtype`: as it is in this step ("step"), in the
                                           step before ("before"), "now", or as it came last, without waiting ("latest");
                                           `on_host`: to the first trainer of each host, who gives it to the others there
    push.rows(x, channel, ids, merge, rows, written, skip, take, up_to, dtype)
                                           like `push.merged` of dense_rows(x, ids, rows, skip); an update writes the "touched"
                                           rows or "all"
    pull.rows(x, channel, ids, when, dtype)
                                           like `pull.value`, these rows of it
    send(x, channel)                       from a server to another: of several owners' values, the first
    gather(x, channel, parts)              from the owners of the pieces of a variable to a server: their values, stacked

In the program of a trainer. Those with a `group` (its name, see `plan.groups`) are among the trainers of this one's group, which
count from 0 in it; without one, among all:

    all_reduce(x, channel, group)          starts the sum of x over all trainers
    all_reduce.later(x, channel)           starts the sum over all trainers that the next step waits for
    wait.before(channel, shape, dtype, device)  the sum that the step before has started
    wait(x, channel)                       its result
    reduce_scatter(xs, channel, trainers, group)
                                           starts the sums of several tensors over all trainers. Of each, laid out flat and cut
                                           into parts of one size with zeros behind its end, a trainer gets its own part
    wait_own(x, channel)                   its result: these parts, one behind another
    gather_parts(xs, channel, trainers, group)
                                           starts to give all trainers the parts of several tensors that each has
    wait_whole(x, channel, sizes, dtypes)  its result: of each so many elements, flat. `dtypes`: by torch's names, where values
                                           of several are gathered
    reduce_to(xs, channel, trainer, group)
                                           starts the sums of several tensors over all trainers, for one of them: its result, by
                                           `wait_own`, are the sums, flat, one behind another
    give(xs, channel, trainer, group)      starts to give all trainers what one of them has; on the others `xs` says its sizes.
                                           Its result comes by `wait_whole`
    gather_rows(x, channel, ids, skip)     starts to gather what own_rows(x, ids, skip) gives on every trainer
    hold_rows(x, channel, ids, skip)       keeps what own_rows(x, ids, skip) gives until the next gather_rows of the channel
    wait_rows(x, channel, merge, trainers) the distinct ids of all trainers, in the order in which they first come, and for
                                           each the sum of its rows, added in the order of trainers; "mean_by_touch": over the
                                           trainers that have it
    sum_on_host(x, channel)                starts the sum of x over the trainers of each host that are there
    wait_on_host(x, channel)               its result on the first of them; on the others x as it was
    push(x, channel, weight)               sends x to the owner of `channel`; a token (an empty tensor) that orders. With a
                                           `weight`, only the first trainer of each host does, as of that weight
    pull(after, channel, shape, dtype, when, on_host)
                                           the owner's value of `channel`, once what `after` sent is in it; or as `when` says
    push_rows(x, channel, ids, skip)       like `push`, without the first `skip` rows and those of no id
    pull_rows(ids, channel, shape, dtype, when)
                                           like `pull`, these rows
"""

from __future__ import annotations

import torch

from syncwright import kernels

NAMESPACE = "syncwright"
_library = torch.library.Library(NAMESPACE, "DEF")

_library.define("gradient(Tensor x, str name) -> Tensor")
_library.define("all_reduce(Tensor x, str channel, str group='') -> Tensor")
_library.define("all_reduce.later(Tensor x, str channel) -> Tensor")
_library.define("wait(Tensor x, str channel) -> Tensor")
_library.define("wait.before(str channel, int[] shape, ScalarType dtype, Device device) -> Tensor")
_library.define("reduce_scatter(Tensor[] xs, str channel, int trainers, str group='') -> Tensor")
_library.define("wait_own(Tensor x, str channel) -> Tensor")
_library.define("gather_parts(Tensor[] xs, str channel, int trainers, str group='') -> Tensor")
_library.define("reduce_to(Tensor[] xs, str channel, int trainer, str group='') -> Tensor")
_library.define("give(Tensor[] xs, str channel, int trainer, str group='') -> Tensor")
_library.define("wait_whole(Tensor x, str channel, int[] sizes, str[]? dtypes=None) -> Tensor[]")
_library.define("sum_on_host(Tensor x, str channel) -> Tensor")
_library.define("wait_on_host(Tensor x, str channel) -> Tensor")
_library.define("push(Tensor x, str channel, Tensor? weight=None) -> Tensor")
_library.define(
    "push.merged(Tensor x, str channel, str merge, int take=0, int up_to=1, ScalarType? dtype=None, Tensor? weight=None) "
    "-> Tensor"
)
_library.define(
    "pull.value(Tensor x, str channel, str when='step', ScalarType? dtype=None, bool on_host=False) -> Tensor"
)
_library.define("send(Tensor x, str channel) -> Tensor")
_library.define("gather(Tensor x, str channel, int parts) -> Tensor")
_library.define(
    "pull(Tensor[] after, str channel, int[] shape, ScalarType dtype, str when='step', bool on_host=False) -> Tensor"
)


def _same(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x)


_library.define("unique(Tensor[] ids, int padding) -> Tensor[]")
_library.define("join_ids(Tensor[] ids, int[] rows, str[] names) -> Tensor")
_library.define("join_offsets(Tensor[] offsets, Tensor[] ids) -> Tensor")
_library.define("take_rows(Tensor x, Tensor ids) -> Tensor")
_library.define("add_rows(Tensor x, Tensor places, SymInt rows) -> Tensor")
_library.define("largest(Tensor x, int count) -> Tensor")
_library.define("add_elements(Tensor x, Tensor places, int parts, int count) -> Tensor")
_library.define("dense_rows(Tensor x, Tensor ids, SymInt rows, int skip=0) -> Tensor")
_library.define(
    "push.rows(Tensor x, str channel, Tensor ids, str merge, int rows, str written, int skip=0, int take=0, int up_to=1, "
    "ScalarType? dtype=None) -> Tensor"
)
_library.define("pull.rows(Tensor x, str channel, Tensor ids, str when='step', ScalarType? dtype=None) -> Tensor")
_library.define("own_rows(Tensor x, Tensor ids, int skip=0) -> Tensor[]")
_library.define("put_rows(Tensor x, Tensor ids, Tensor rows) -> Tensor")
_library.define("gather_rows(Tensor x, str channel, Tensor ids, int skip=0) -> Tensor")
_library.define("hold_rows(Tensor x, str channel, Tensor ids, int skip=0) -> Tensor")
_library.define("wait_rows(Tensor x, str channel, str merge, int trainers) -> Tensor[]")
_library.define("push_rows(Tensor x, str channel, Tensor ids, int skip=0) -> Tensor")
_library.define("pull_rows(Tensor ids, str channel, int[] shape, ScalarType dtype, str when='step') -> Tensor")


torch.library.register_fake(f"{NAMESPACE}::gradient", _same, lib=_library)
torch.library.register_fake(f"{NAMESPACE}::all_reduce", _same, lib=_library)
torch.library.register_fake(f"{NAMESPACE}::wait", _same, lib=_library)
torch.library.register_fake(f"{NAMESPACE}::wait_own", _same, lib=_library)
torch.library.register_fake(f"{NAMESPACE}::sum_on_host", _same, lib=_library)
torch.library.register_fake(f"{NAMESPACE}::wait_on_host", _same, lib=_library)
torch.library.register_fake(f"{NAMESPACE}::send", _same, lib=_library)


@torch.library.register_fake(f"{NAMESPACE}::reduce_scatter", lib=_library)
def _reduce_scatter(xs: list[torch.Tensor], channel: str, trainers: int, group: str = "") -> torch.Tensor:
    return xs[0].new_empty([sum(-(-x.numel() // trainers) for x in xs)])


@torch.library.register_fake(f"{NAMESPACE}::reduce_to", lib=_library)
def _reduce_to(xs: list[torch.Tensor], channel: str, trainer: int, group: str = "") -> torch.Tensor:
    return xs[0].new_empty([sum(x.numel() for x in xs)])


@torch.library.register_fake(f"{NAMESPACE}::gather_parts", lib=_library)
@torch.library.register_fake(f"{NAMESPACE}::give", lib=_library)
def _gather_parts(xs: list[torch.Tensor], channel: str, trainers: int, group: str = "") -> torch.Tensor:
    return xs[0].new_empty([0])


@torch.library.register_fake(f"{NAMESPACE}::wait_whole", lib=_library)
def _wait_whole(x: torch.Tensor, channel: str, sizes: list[int], dtypes: list[str] | None = None) -> list[torch.Tensor]:
    kinds = [x.dtype] * len(sizes) if dtypes is None else [getattr(torch, name) for name in dtypes]
    return [x.new_empty([size], dtype=dtype) for size, dtype in zip(sizes, kinds, strict=True)]


@torch.library.register_fake(f"{NAMESPACE}::push.merged", lib=_library)
def _push_merged(
    x: torch.Tensor,
    channel: str,
    merge: str,
    take: int = 0,
    up_to: int = 1,
    dtype: torch.dtype | None = None,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    return torch.empty_like(x, dtype=dtype)


@torch.library.register_fake(f"{NAMESPACE}::pull.value", lib=_library)
def _pull_value(
    x: torch.Tensor, channel: str, when: str = "step", dtype: torch.dtype | None = None, on_host: bool = False
) -> torch.Tensor:
    return torch.empty_like(x, dtype=dtype)


@torch.library.register_fake(f"{NAMESPACE}::gather", lib=_library)
def _gather(x: torch.Tensor, channel: str, parts: int) -> torch.Tensor:
    return x.new_empty([parts, *x.shape])


@torch.library.register_fake(f"{NAMESPACE}::all_reduce.later", lib=_library)
def _all_reduce_later(x: torch.Tensor, channel: str) -> torch.Tensor:
    return torch.empty(0)


@torch.library.register_fake(f"{NAMESPACE}::wait.before", lib=_library)
def _wait_before(channel: str, shape: list[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


@torch.library.register_fake(f"{NAMESPACE}::push", lib=_library)
def _push(x: torch.Tensor, channel: str, weight: torch.Tensor | None = None) -> torch.Tensor:
    return torch.empty(0)


@torch.library.register_fake(f"{NAMESPACE}::pull", lib=_library)
def _pull(
    after: list[torch.Tensor],
    channel: str,
    shape: list[int],
    dtype: torch.dtype,
    when: str = "step",
    on_host: bool = False,
) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


@torch.library.register_fake(f"{NAMESPACE}::unique", lib=_library)
def _unique_shapes(ids: list[torch.Tensor], padding: int) -> list[torch.Tensor]:
    places = sum(each.numel() for each in ids) + int(padding >= 0)
    return [ids[0].new_empty([places], dtype=torch.int64), *[torch.empty_like(each) for each in ids]]


@torch.library.register_fake(f"{NAMESPACE}::join_ids", lib=_library)
def _join_ids_shape(ids: list[torch.Tensor], rows: list[int], names: list[str]) -> torch.Tensor:
    return ids[0].new_empty([sum(each.numel() for each in ids)])


@torch.library.register_fake(f"{NAMESPACE}::join_offsets", lib=_library)
def _join_offsets_shape(offsets: list[torch.Tensor], ids: list[torch.Tensor]) -> torch.Tensor:
    return offsets[0].new_empty([sum(each.numel() for each in offsets)])


@torch.library.register_fake(f"{NAMESPACE}::take_rows", lib=_library)
def _take_rows_shape(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return x.new_empty([ids.shape[0], *x.shape[1:]])


@torch.library.register_fake(f"{NAMESPACE}::add_rows", lib=_library)
def _add_rows_shape(x: torch.Tensor, places: torch.Tensor, rows: int) -> torch.Tensor:
    return x.new_empty([rows, *x.shape[places.dim() :]])


@torch.library.register_fake(f"{NAMESPACE}::largest", lib=_library)
def _largest_shape(x: torch.Tensor, count: int) -> torch.Tensor:
    return x.new_empty([count], dtype=torch.int32)


@torch.library.register_fake(f"{NAMESPACE}::add_elements", lib=_library)
def _add_elements_shape(x: torch.Tensor, places: torch.Tensor, parts: int, count: int) -> torch.Tensor:
    return x.new_empty([count])


@torch.library.register_fake(f"{NAMESPACE}::dense_rows", lib=_library)
def _dense_rows_shape(x: torch.Tensor, ids: torch.Tensor, rows: int, skip: int = 0) -> torch.Tensor:
    return x.new_empty([rows, *x.shape[1:]])


@torch.library.register_fake(f"{NAMESPACE}::own_rows", lib=_library)
def _own_rows_shapes(x: torch.Tensor, ids: torch.Tensor, skip: int = 0) -> list[torch.Tensor]:
    return [torch.empty_like(ids), torch.empty_like(x)]


@torch.library.register_fake(f"{NAMESPACE}::put_rows", lib=_library)
def _put_rows_shape(x: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.register_fake(f"{NAMESPACE}::gather_rows", lib=_library)
def _gather_rows_shape(x: torch.Tensor, channel: str, ids: torch.Tensor, skip: int = 0) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.register_fake(f"{NAMESPACE}::hold_rows", lib=_library)
def _hold_rows(x: torch.Tensor, channel: str, ids: torch.Tensor, skip: int = 0) -> torch.Tensor:
    return torch.empty(0)


@torch.library.register_fake(f"{NAMESPACE}::wait_rows", lib=_library)
def _wait_rows_shapes(x: torch.Tensor, channel: str, merge: str, trainers: int) -> list[torch.Tensor]:
    rows = x.new_empty([trainers * x.shape[0], *x.shape[1:]])
    return [rows.new_empty([trainers * x.shape[0]], dtype=torch.int64), rows]


@torch.library.register_fake(f"{NAMESPACE}::push.rows", lib=_library)
def _push_rows_merged(
    x, channel: str, ids, merge: str, rows: int, written: str, skip: int = 0, take: int = 0, up_to: int = 1, dtype=None
) -> torch.Tensor:
    return x.new_empty([rows, *x.shape[1:]], dtype=dtype)


@torch.library.register_fake(f"{NAMESPACE}::pull.rows", lib=_library)
def _pull_rows_value(x, channel: str, ids, when: str = "step", dtype=None) -> torch.Tensor:
    return x.new_empty([ids.shape[0], *x.shape[1:]], dtype=dtype)


@torch.library.register_fake(f"{NAMESPACE}::push_rows", lib=_library)
def _push_rows(x: torch.Tensor, channel: str, ids: torch.Tensor, skip: int = 0) -> torch.Tensor:
    return torch.empty(0)


@torch.library.register_fake(f"{NAMESPACE}::pull_rows", lib=_library)
def _pull_rows(
    ids: torch.Tensor, channel: str, shape: list[int], dtype: torch.dtype, when: str = "step"
) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


_library.impl("own_rows", kernels.own_rows, "CompositeExplicitAutograd")
_library.impl("put_rows", kernels.put_rows, "CompositeExplicitAutograd")
_library.impl("unique", kernels.unique, "CompositeExplicitAutograd")
_library.impl("join_ids", kernels.join_ids, "CompositeExplicitAutograd")
_library.impl("join_offsets", kernels.join_offsets, "CompositeExplicitAutograd")
_library.impl("take_rows", kernels.take_rows, "CompositeExplicitAutograd")
_library.impl("add_rows", kernels.add_rows, "CompositeExplicitAutograd")
_library.impl("largest", kernels.largest, "CompositeExplicitAutograd")
_library.impl("add_elements", kernels.add_elements, "CompositeExplicitAutograd")
_library.impl("dense_rows", kernels.dense_rows, "CompositeExplicitAutograd")
_library.impl("gradient", lambda x, name: x, "CompositeExplicitAutograd")

gradient = torch.ops.syncwright.gradient.default
all_reduce = torch.ops.syncwright.all_reduce.default
all_reduce_later = torch.ops.syncwright.all_reduce.later
wait = torch.ops.syncwright.wait.default
wait_before = torch.ops.syncwright.wait.before
reduce_scatter = torch.ops.syncwright.reduce_scatter.default
wait_own = torch.ops.syncwright.wait_own.default
gather_parts = torch.ops.syncwright.gather_parts.default
reduce_to = torch.ops.syncwright.reduce_to.default
give = torch.ops.syncwright.give.default
wait_whole = torch.ops.syncwright.wait_whole.default
sum_on_host = torch.ops.syncwright.sum_on_host.default
wait_on_host = torch.ops.syncwright.wait_on_host.default
push = torch.ops.syncwright.push.default
pull = torch.ops.syncwright.pull.default
push_merged = torch.ops.syncwright.push.merged
pull_value = torch.ops.syncwright.pull.value
send = torch.ops.syncwright.send.default
gather = torch.ops.syncwright.gather.default
unique = torch.ops.syncwright.unique.default
join_ids = torch.ops.syncwright.join_ids.default
join_offsets = torch.ops.syncwright.join_offsets.default
take_rows = torch.ops.syncwright.take_rows.default
add_rows = torch.ops.syncwright.add_rows.default
largest = torch.ops.syncwright.largest.default
add_elements = torch.ops.syncwright.add_elements.default
dense_rows = torch.ops.syncwright.dense_rows.default
own_rows = torch.ops.syncwright.own_rows.default
put_rows = torch.ops.syncwright.put_rows.default
gather_rows = torch.ops.syncwright.gather_rows.default
hold_rows = torch.ops.syncwright.hold_rows.default
wait_rows = torch.ops.syncwright.wait_rows.default
push_rows_merged = torch.ops.syncwright.push.rows
pull_rows_value = torch.ops.syncwright.pull.rows
push_rows = torch.ops.syncwright.push_rows.default
pull_rows = torch.ops.syncwright.pull_rows.default

SENDS = frozenset(
    {
        *(all_reduce, all_reduce_later, reduce_scatter, reduce_to, gather_parts, give, gather_rows, hold_rows),
        *(sum_on_host, push, push_rows),
    }
)
WAITS = frozenset({wait, wait_own, wait_whole, wait_rows, wait_on_host})
COMMUNICATION = frozenset({*SENDS, *WAITS, wait_before, pull, pull_rows})
PORTED = frozenset({*COMMUNICATION, unique})
"""What a running program hands to its port: communication, and what may have been computed ahead."""
STARTS_ROWS = frozenset({gather_rows, hold_rows, push_rows})
"""What sends rows: (rows, channel, ids, how many of the first are left out)."""
LOOSE = frozenset({own_rows, wait_rows})
"""What gives as many rows as there are: no compiled program may be made for their number."""
SIZED = frozenset({dense_rows, put_rows})
"""What makes of them as many as a table has."""
PUSHES = frozenset({push_merged, push_rows_merged})
PULLS = frozenset({pull_value, pull_rows_value})
CROSSINGS = frozenset({*PUSHES, *PULLS, send, gather})
