"""The architecture, as a list: what is public, and which file may import which."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import syncwright

ROOT = Path(syncwright.__file__).parent

PUBLIC = [
    "AllGather",
    "AllReduce",
    "Local",
    "LocalSteps",
    "ParameterServer",
    "Plan",
    "Program",
    "Role",
    "Rules",
    "Shard",
    "Trainer",
    "Variable",
    "capture",
    "deferred",
    "distribute",
    "loopback",
]

# A file imports only from lines above its own, and from the indented lines above its own in its package.
# `__init__` files stand apart: they gather what their package gives to those below.
LAYOUT = """
errors          the exception tree
near            did you mean ...?
document        YAML that knows its lines
typed           dataclasses that hold what their annotations say, in Python and in YAML
cluster         facts about machines
tables          rows by 64-bit id, on one machine
    mixing
    lazily
    index
    initial
    admission
    settings
    saved
    store
    table
selection       a part of a variable, and who owns it
tree            trees of values, such as batches
place           where each node of a whole program runs
program         Program, Variable, Role
items           rows of tensors, read and written as bytes
kernels         what operators on rows and elements compute
ops             communication, as operators of a graph
schema          a node's arguments by name
dead            dead nodes
shapes          fake values of new nodes
held            what a run holds, in bytes
regions         where a program turns from forward to backward
text            Program to stable text and back
    words
    line
    write
    read
    diff
deferred        large tensors that are recorded, and made by who keeps them
    record
    replay
    tensor
    mode
optim           optimizers that torch lacks
    row_wise_adagrad
nn              modules that torch lacks
    slots
    row_state
    hash_embedding
    hash_embedding_bag
plan            how each variable is shared
    partition
    placement
    outer
    compression
    precision
    sync
    groups
    rules
    plan
    spans
    by_id
    resolve
    check
job             programs by role and phase, and what crosses between them
verify          legal programs, one error class per rule
    causes
    arguments
    placed
    program
    passes
    running
    server
    job
meaning         what each node of an update is made from, from graph edges
update          how each update may be split, and which global values it reads
untouched       whether an update leaves rows alone that have no gradient
split           who owns what, and where each node of an update runs
cut             from a whole program to a program for each role
    crossing
    piece
    servers
    trainer
    of_trainer
    roles
strategies      a name to rules
    fixed
planning        what a user gives as plan= to the complete plan
capture         a step, a model and optimizers to a Program; the only part that knows torch.optim
    private
    lines
    draws
    axes
    sizes
    sparse_adam
    initial
    scaling
    state
    functional
    sparse
    means
    refusals
    stepping
    own_scale
    unbounded
    foreach
    trace
    normalize
    examples
    lookups
    tables
    step
passes          one rewrite of the whole program per file
    insert
    compress
    alike
    flat
    accumulate
    accumulate_parts
    only_accumulate
    sync_batch_norm
    clip_per_trainer
    compact_lookups
    note_lookups
    join_tables
    join_served
    serve_parameters
    compensate
    share_globals
    merge_on_host
    copy_on_host
    average
    delay
    read_gathered
    keep_whole
    shard_parameters
    gather_parameters
    gather_rows
    bucket
    bucket_delayed
    power_sgd
    gather_compressed
    keep_unsent
    bucket_parts
    recompute
    flatten
    reduce_by_node
    tidy
global_batch    lookups that only the whole batch can tell
delayed         the first step and what follows the last, where gradients are applied one step late
idle            the program of a trainer without examples
meeting_steps   what trainers that train alone do when they meet, written as a user writes a step
exchanges       such steps, captured
lower           Program and Plan to a Job
runtime         what runs a job
    heap
    large_pages
    messages
    deadlines
    transport
    membership
    rendezvous
    endpoint
    heartbeat
    blocks
    shared_memory
    host_copies
    gathers
    scatters
    kept_whole
    groups
    collectives
    wire
    bundles
    packed
    limits
    traffic
    guard
    parcels
    intake
    metrics
    sockets
    meeting
    announce
    forking
    launch
    watching
    rows
    executor
    records
    inductor
    segments
    compiled
    merging
    slots
    places
    served_table
    row_server
    devices
    ticking
    table_server
    interpreter
    below
    server
    joint_server
    row_client
    gathered
    own_parts
    table_client
    client
    lane
    flat_values
    pieces
    structure
    kept
    lookahead
    calls
    programs
    sharding
    evaluation
    outer
    replica_tables
    replica
    released
    agreement
    session
    on_host
    loopback
    replay
    intercept
    serving
    hosting
    joined
    uneven
    trainer
reference       what one device computes, in plain PyTorch
checking        a plan against one device
view            tables and diffs for people
    tables
    planned
    memory
    programs
    script
    look
    checked
    top
demo            the main job on real data
    course
cli             the command `syncwright`
"""


def order() -> list[str]:
    """The modules' names without `syncwright.`, from the top of LAYOUT down."""
    names: list[str] = []
    package = ""
    for line in LAYOUT.strip().splitlines():
        name = line.split()[0]
        if line.startswith(" "):
            names.append(f"{package}.{name}")
        else:
            package = name
            names.append(name)
    return names


PLACES = {name: place for place, name in enumerate(order())}


def modules() -> dict[str, Path]:
    """Every module but `__init__` files, by its name without `syncwright.`."""
    files = [path for path in ROOT.rglob("*.py") if path.name != "__init__.py"]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}


def place(module: str) -> tuple[int, ...]:
    """Where a module stands: its line, or its package's line and then its own."""
    assert module in PLACES, f"give {module} a line in LAYOUT, below everything that it imports"
    package, _, inside = module.partition(".")
    if not inside:
        return (PLACES[package],)
    return (PLACES[package], PLACES[module])


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, module) of everything of Syncwright's that a file imports, also inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        own = [name.removeprefix("syncwright.") for name in names if name.startswith("syncwright.")]
        found += [(node.lineno, known(name)) for name in own]
    return found


def known(name: str) -> str:
    """The module of a dotted name: known("plan.plan.Plan") == "plan.plan", known("plan.Plan") == "plan"."""
    while not (ROOT.joinpath(*name.split(".")).is_dir() or ROOT.joinpath(*name.split(".")).with_suffix(".py").exists()):
        assert "." in name, f"no file is syncwright.{name}"
        name = name.rpartition(".")[0]
    return name


def test_public_names_are_those_listed():
    assert sorted(syncwright.__all__) == sorted(PUBLIC)
    assert len(syncwright.__all__) <= 20
    for name in syncwright.__all__:
        assert getattr(syncwright, name) is not None, name


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_module_imports_only_from_those_above_it(module):
    package, here = module.partition(".")[0], place(module)
    for line, imported in imports(modules()[module]):
        above = place(imported) < here and imported != package
        assert above, f"{modules()[module]}:{line}: {module} imports {imported}, which does not stand above it"


def test_names_of_modules_say_what_they_hold():
    vague = {"utils", "util", "common", "helper", "helpers", "manager", "misc"}
    assert not [name for name in modules() if vague & set(name.split("."))]
