"""A plan as a table: every variable, how it is shared, who owns it, and what that costs each step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch.fx import Node

from syncwright import ops
from syncwright.job import Job
from syncwright.lower import communications
from syncwright.meaning import followed
from syncwright.passes.average import PIECE
from syncwright.passes.read_gathered import AGAIN
from syncwright.passes.reduce_by_node import BACK, OVER
from syncwright.plan import AllReduce, LocalSteps, ParameterServer, Plan, Shard, Sharing, shown
from syncwright.planning import plan_variables
from syncwright.program import Program, Role, Variable
from syncwright.schema import argument
from syncwright.split import grad_variable
from syncwright.text import variable_type_text
from syncwright.typed import tag
from syncwright.view.tables import Table, counted, roles_text, size_text

_COLUMNS = ("variable", "role", "type", "size", "sharing", "owner", "sent", "received")
_RIGHT = frozenset({"size", "sent", "received"})
_MANY_PIECES = 4
OTHER = ""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that one trainer sends and receives in a step."""

    sent: float = 0.0
    received: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.sent + other.sent, self.received + other.received)

    def over(self, steps: int) -> Traffic:
        """The same, once in so many steps."""
        return Traffic(self.sent / steps, self.received / steps)


def plan_table(program: Program, plan: Plan, unbucketed: Job) -> Table:
    """The plan of a captured program.

    unbucketed  its job, lowered without the passes `JOINING`, so that every variable's communication stands alone
    """
    traffic, variables = traffic_of(program, unbucketed), _variables(program)
    rows = [_row(v, *_shared(v, program, plan), traffic.get(v.name, Traffic())) for v in variables]
    totals = [
        (
            "total",
            "",
            "",
            size_text(sum(v.nbytes for v in variables if v.unbounded is None)),
            "",
            "",
            *_bytes(_sum(traffic)),
        )
    ]
    if OTHER in traffic:
        totals.insert(0, ("weights, norms, what the step returns", "", "", "", "", "", *_bytes(traffic[OTHER])))
    title = f"The plan for {roles_text(plan)}; sent and received: bytes per step of one trainer"
    return Table(title, _COLUMNS, tuple(rows), tuple(totals), _RIGHT)


def plan_notes(program: Program, plan: Plan, job: Job) -> list[str]:
    """What the table does not say: optimizer state, tied weights, the number of messages, the plan's own notes."""
    states = [variable for variable in program.of_role(Role.STATE) if variable.of is not None]
    tied = [f"{v.name} is also {', '.join(v.aliases)}" for v in program.variables.values() if v.aliases]
    kept = f"{counted(len(states), 'variable')} of optimizer state ({size_text(sum(v.nbytes for v in states))})"
    where = [f"{kept}: each where its parameter is updated"] if states else []
    return [*where, *tied, _messages(job), *plan.notes]


def traffic_of(program: Program, unbucketed: Job) -> dict[str, Traffic]:
    """By variable; `OTHER` for what belongs to none.

    A ring all-reduce sends 2 (N-1)/N of its bytes, and receives as many; a reduction to parts, or a gathering of parts, half of
    that; a reduction to one trainer, or what one gives to all, as much on average; a gathering of rows sends them, with their
    ids, N-1 times, and receives as many; a push sends all, a pull receives all. Of rows as many are counted as a batch has ids:
    distinct ones are fewer. Of exchanges their share of a step. What trainers do in groups is counted for the largest of these.
    What is merged or copied on hosts is counted for who pushes and pulls it.
    """
    subjects = _subjects(program, unbucketed)
    found: dict[str, Traffic] = {}
    for job, steps in [(unbucketed, 1), *((each.job, each.clock.every) for each in unbucketed.exchanges)]:
        for node in communications(job.trainer["step"]):
            members = unbucketed.plan.groups.members(str(argument(node, "group") or ""))
            traffic = _traffic(node, max(map(len, members)))
            if traffic is not None:
                name = subjects.get(_carried(str(node.args[1])), OTHER)
                found[name] = found.get(name, Traffic()) + traffic.over(steps)
    return found


def _carried(channel: str) -> str:
    """What travels by a channel, or by those that are for a part or a phase of it."""
    for suffix in (f" {AGAIN}", OVER, BACK):
        channel = channel.removesuffix(suffix)
    return channel.partition(PIECE)[0]


def _variables(program: Program) -> list[Variable]:
    """What a plan is about, and the buffers that go with a parameter."""
    return [*plan_variables(program), *(program.variables[name] for name in followed(program))]


def _sum(traffic: Mapping[str, Traffic]) -> Traffic:
    return sum(traffic.values(), Traffic())


def _traffic(node: Node, trainers: int) -> Traffic | None:
    match node.target:
        case ops.all_reduce | ops.all_reduce_later:
            ring = 2 * (trainers - 1) / trainers * _nbytes(node.args[0])
            return Traffic(ring, ring)
        case ops.reduce_scatter:
            ring = (trainers - 1) * _nbytes(node)
            return Traffic(ring, ring)
        case ops.reduce_to | ops.give:  # of all trainers together as much for each but one
            once = (trainers - 1) / trainers * sum(_nbytes(part) for part in node.args[0])  # type: ignore[union-attr]
            return Traffic(once, once)
        case ops.gather_parts:
            ring = (trainers - 1) * sum(_nbytes(part) for part in node.args[0])  # type: ignore[union-attr]
            return Traffic(ring, ring)
        case ops.gather_rows:
            ring = (trainers - 1) * (_nbytes(node) + _nbytes(node.args[2]))
            return Traffic(ring, ring)
        case ops.push | ops.push_rows:
            return Traffic(sent=_nbytes(node.args[0]))
        case ops.pull | ops.pull_rows:
            return Traffic(_nbytes(node.args[0]) if node.target is ops.pull_rows else 0, _nbytes(node))
    return None


def _nbytes(node: object) -> int:
    assert isinstance(node, Node), "communications take and give nodes"
    val = node.meta["val"]
    return val.numel() * val.element_size()


def _subjects(program: Program, job: Job) -> Mapping[str, str]:
    """Which variable of the table each channel is for."""
    shown = {v.name for v in _variables(program)}
    grads = {grad_variable(program, v.name).name: v.name for v in program.of_role(Role.PARAM)}
    found = {**grads, **{name: name for name in shown}}
    for name, channel in [pair for each in (job, *_exchanged(job)) for pair in each.channels.items()]:
        whole = channel.variable.whole or channel.variable.name
        if whole in grads or whole in shown:
            found[name] = grads.get(whole, whole)
    for name, variable in [pair for each in _exchanged(job) for pair in each.held.items()]:
        whole = variable.whole or name
        found[name] = whole if whole in shown else variable.of or OTHER
    for name, variable in job.held.items():
        whole = program.variables[variable.whole or name]
        found[name] = whole.name if whole.name in shown else whole.of or OTHER
    return found


def _exchanged(job: Job) -> list[Job]:
    return [each.job for each in job.exchanges]


def _row(variable: Variable, sharing: str, owner: str, traffic: Traffic) -> tuple[str, ...]:
    kind = variable_type_text(variable) + (" sparse" if variable.sparse else "")
    size = size_text(variable.nbytes)
    if variable.unbounded is not None:  # nobody knows its length
        kind, size = f"{variable_type_text(replace(variable, shape=variable.shape[1:]))} for each id", ""
    return (variable.name, variable.role.value, kind, size, sharing, owner, *_bytes(traffic))


def _shared(variable: Variable, program: Program, plan: Plan) -> tuple[str, str]:
    """The columns `sharing` and `owner`."""
    parameter = followed(program).get(variable.name)
    if parameter is not None:
        return f"with {parameter}", _owner(plan.sharing(parameter))
    if variable.role is Role.BUFFER:
        policy = dict(plan.buffers)[variable.name]
        return policy, "each trainer" if policy == "local" else "every trainer"
    sharing = plan.sharing(variable.name)
    name = tag(type(sharing.sync))
    if isinstance(sharing.sync, Shard):
        within = ", within a node" if sharing.sync.within == "node" else ""
        return f"{name}, stage {sharing.sync.stage}{within}", "every trainer its part"
    if isinstance(sharing.sync, AllReduce) and sharing.sync.over != "all":
        name += f" over {shown(sharing.sync.over)}"
    if isinstance(sharing.sync, AllReduce) and sharing.sync.hierarchical:
        name += ", hierarchical"
    if isinstance(sharing.sync, LocalSteps):
        name += f", every {sharing.sync.every}"
    if len(sharing.sizes) > 1:
        few = len(sharing.sizes) <= _MANY_PIECES
        unit = "shards" if sharing.shards else "rows"
        name += f", {unit} {'+'.join(map(str, sharing.sizes))}" if few else f", {len(sharing.sizes)} pieces"
    if isinstance(sharing.sync, ParameterServer):
        joined = {"merged": sharing.sync.merge_on_host, "copied": sharing.sync.copy_on_host}
        words = " and ".join(word for word, is_so in joined.items() if is_so)
        name += f", {words} on hosts" if words else ""
    return name, _owner(sharing)


def _owner(sharing: Sharing) -> str:
    owners = sharing.owners
    if not owners:
        return "every trainer"
    if len(set(owners)) == 1:
        return f"server {owners[0]}"
    return f"servers {', '.join(map(str, owners))}" if len(owners) <= _MANY_PIECES else f"{len(set(owners))} servers"


def _bytes(traffic: Traffic) -> tuple[str, str]:
    return size_text(traffic.sent), size_text(traffic.received)


def _messages(job: Job) -> str:
    exchanges = [f"every {each.clock.every} steps: {_counted(each.job)}" for each in job.exchanges]
    return "; ".join([f"a step of one trainer: {_counted(job)}", *exchanges])


def _counted(job: Job) -> str:
    nodes = [n.target for n in communications(job.trainer["step"])]
    kinds = (
        *((ops.all_reduce, "all-reduce", "all-reduces"), (ops.push, "push", "pushes"), (ops.pull, "pull", "pulls")),
        (ops.all_reduce_later, "all-reduce for the next step", "all-reduces for the next step"),
        (ops.reduce_scatter, "reduce-scatter", "reduce-scatters"),
        (ops.gather_parts, "gathering of parts", "gatherings of parts"),
        (ops.reduce_to, "reduction to one trainer", "reductions to one trainer"),
        (ops.give, "broadcast", "broadcasts"),
        (ops.gather_rows, "gathering of rows", "gatherings of rows"),
        (ops.sum_on_host, "sum on its host", "sums on its host"),
        *((ops.push_rows, "push of rows", "pushes of rows"), (ops.pull_rows, "pull of rows", "pulls of rows")),
    )
    counts = [counted(nodes.count(target), *nouns) for target, *nouns in kinds if target in nodes]
    return ", ".join(counts) or "no communication"
