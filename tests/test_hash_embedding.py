"""Embeddings of ids that nobody has counted: bit-equal to torch's on a known vocabulary, and what they do beyond it."""

from __future__ import annotations

import io
import pickle
import resource
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import SGD, Adagrad, Optimizer, SparseAdam

import syncwright
from syncwright.errors import PlanError, TableError, TableFull
from syncwright.nn import (
    Constant,
    CountFilter,
    HashEmbedding,
    HashEmbeddingBag,
    Normal,
    Probability,
    ScoreDecay,
    ShowClick,
    TimeToLive,
    Uniform,
)
from syncwright.optim import RowWiseAdagrad
from syncwright.tables.initial import rows

VOCABULARY = torch.tensor([-(2**63), -1, 0, 1, 17, 2**40, 2**63 - 1, 3, 99, -12345])
MAKE: dict[str, Callable[[nn.Module], Optimizer]] = {
    "SGD": lambda m: SGD(m.parameters(), lr=0.1),
    "momentum": lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9),
    "Adagrad": lambda m: Adagrad(m.parameters(), lr=0.1, initial_accumulator_value=0.5),
    "SparseAdam": lambda m: SparseAdam(m.parameters(), lr=0.1),
    "RowWiseAdagrad": lambda m: RowWiseAdagrad(m.parameters(), lr=0.1, initial_accumulator_value=0.5),
}
STATEFUL = [name for name in MAKE if name not in ("SGD", "momentum")]


def draws(shape: tuple[int, ...], steps: int) -> list[torch.Tensor]:
    """Positions in the vocabulary, with repeats."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(len(VOCABULARY), shape, generator=generator) for _ in range(steps)]


def train(module: nn.Module, optimizer: Optimizer, *given: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    out = module(*given, **more)
    loss = (out * torch.linspace(-1, 2, out.shape[-1]) + out**2).sum()
    loss.backward()
    optimizer.step()
    return loss.detach()


def read(module: HashEmbedding, ids: torch.Tensor = VOCABULARY) -> torch.Tensor:
    """As evaluation reads."""
    was = module.training
    with torch.no_grad():
        found = module.eval()(ids)
    module.train(was)
    return found


@pytest.mark.parametrize("ids", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("optimizer", [name for name in MAKE if name != "momentum"])
def test_a_known_vocabulary_trains_to_the_bits_of_torch(optimizer, ids):
    vocabulary = VOCABULARY if ids is torch.int64 else (VOCABULARY >> 33 ^ torch.arange(10)).to(ids)
    ours = HashEmbedding(4, capacity=20, seed=5)
    theirs = nn.Embedding.from_pretrained(rows(Normal(), 5, vocabulary, 4, torch.float32), freeze=False, sparse=True)
    one, other = MAKE[optimizer](ours), MAKE[optimizer](theirs)
    for at in draws((3, 2), 6):
        assert torch.equal(train(ours, one, vocabulary[at]), train(theirs, other, at))
    known = torch.cat(draws((3, 2), 6)).unique()
    assert torch.equal(read(ours, vocabulary[known]), theirs.weight[known])
    assert ours.count() == len(known)


BAGS = [(mode, form) for mode in ("sum", "mean", "max") for form in ("rows", "offsets", "last offset")]


@pytest.mark.parametrize(("mode", "form"), [*BAGS, ("sum", "weights")])
@pytest.mark.parametrize("padding", [False, True])
def test_bags_are_those_of_torch(mode, padding, form):
    """Also empty bags, and bags of padding alone."""
    initial = rows(Uniform(-1, 1), 5, VOCABULARY, 4, torch.float32)
    last, padded = form == "last offset", 3 if padding else None
    theirs = nn.EmbeddingBag(
        10, 4, mode=mode, _weight=initial.clone(), padding_idx=padded, include_last_offset=last, sparse=mode != "max"
    )
    ours = HashEmbeddingBag(
        4, mode=mode, capacity=20, seed=5, initial=Uniform(-1, 1), include_last_offset=last,
        padding_id=1 if padding else None,
    )  # fmt: skip
    if padding:
        with torch.no_grad():
            theirs.weight[3] = 0
    one, other = SGD(ours.parameters(), lr=0.1), SGD(theirs.parameters(), lr=0.1)
    more: tuple[torch.Tensor, ...] = ()
    if form in ("offsets", "last offset"):
        more = (torch.tensor([0, 2, 2, 3, 12]),)
    elif form == "weights":
        more = (None, torch.linspace(0.5, 2, 12).view(4, 3))  # type: ignore[assignment]
    for at in [torch.full((12,), 3), *draws((12,), 5)]:
        at = at.view(4, 3) if form in ("rows", "weights") else at
        losses = train(ours, one, VOCABULARY[at], *more), train(theirs, other, at, *more)
        torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        single = ours.eval()(VOCABULARY[:, None])
    torch.testing.assert_close(single, theirs.weight.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_nothing(mode):
    bag = HashEmbeddingBag(2, mode=mode, capacity=9)
    out = bag(VOCABULARY[:0], torch.tensor([0, 0, 0]))
    assert out.tolist() == [[0, 0]] * 3
    out.sum().backward()
    assert bag.count() == 0


def test_weights_of_a_bag_get_gradients():
    bag = HashEmbeddingBag(2, mode="sum", capacity=9, initial=Constant(3.0))
    weights = torch.ones(1, 2, requires_grad=True)
    bag(torch.tensor([[4, 5]]), per_sample_weights=weights).sum().backward()
    assert weights.grad is not None
    assert weights.grad.tolist() == [[6, 6]]
    with pytest.raises(TableError, match=r"^found per_sample_weights with mode='mean'; expected them with mode='sum'"):
        HashEmbeddingBag(2, capacity=9)(torch.tensor([[4]]), per_sample_weights=torch.ones(1, 1))
    with pytest.raises(TableError, match=r"found mode='average'; expected 'sum', 'mean' or 'max'"):
        HashEmbeddingBag(2, capacity=9, mode="average")  # type: ignore[arg-type]


@pytest.mark.parametrize(("mode", "expected"), [("sum", 2.0), ("mean", 1.0), ("max", 2.0)])
def test_an_id_without_a_row_counts_as_zeros_and_is_not_trained(mode, expected):
    """Padding does not count: the mean of [2, 0, padding] is 1."""
    bag = HashEmbeddingBag(1, mode=mode, capacity=9, initial=Constant(2.0), admission=CountFilter(2), padding_id=0)
    bag(torch.tensor([[7, 7]]))
    out = bag(torch.tensor([[7, 8, 0]]))
    assert out.tolist() == [[expected]]
    out.sum().backward()
    assert bag.weight.grad is not None
    dense = bag.weight.grad.coalesce().to_dense().flatten()
    assert dense.nonzero().flatten().tolist() == bag.slots(torch.tensor([7])).tolist()


def test_evaluation_never_creates():
    module = HashEmbedding(2, capacity=4).eval()
    before = deepcopy(module.state_dict())
    assert not module(VOCABULARY).any()
    assert module(torch.tensor([1, 2, 3, 4, 5, 6])).shape == (6, 2)
    assert all(torch.equal(before[n], t) for n, t in module.state_dict().items())
    module.train()
    module(VOCABULARY[:2])
    assert read(module).any(1).tolist() == [True, True] + [False] * 8
    assert module.count() == 2


def test_a_full_table_says_what_to_do():
    module = HashEmbedding(2, capacity=3)
    module(torch.tensor([1, 2]))
    with pytest.raises(
        TableFull, match=r"the table holds 2 ids, and 2 more do not fit: its capacity is 3\. Expected room"
    ):
        module(torch.tensor([2, 3, 4]))
    assert module.count() == 2
    module(torch.tensor([2, 3]))
    assert module.count() == 3


def test_count_filter_of_three():
    """The first two times an id is read it is zeros and is not trained; the third time admits it."""
    module = HashEmbedding(2, capacity=4, initial=Constant(1.0), admission=CountFilter(3))
    optimizer = SGD(module.parameters(), lr=0.5)
    ids, found = torch.tensor([6]), []
    for _ in range(4):
        optimizer.zero_grad()
        out = module(ids)
        out.sum().backward()
        optimizer.step()
        found.append(out[0, 0].item())
    assert found == [0, 0, 1, 0.5]
    assert not module.weight[-1].any()


@pytest.mark.parametrize(
    "options",
    [{}, {"admission": CountFilter(2)}, {"admission": Probability(0.5)}, {"eviction": TimeToLive(1)}],
    ids=["plain", "count", "probability", "time"],
)
def test_the_state_dict_is_all_there_is(options):
    """Also as a file; moved to another dtype, a table keeps its ids. Both go on alike."""
    module, copy = (HashEmbedding(3, capacity=30, seed=4, **options) for _ in range(2))
    optimizer = SGD(module.parameters(), lr=0.1)
    for at in draws((5,), 3):
        train(module, optimizer, VOCABULARY[at])
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    copy.load_state_dict(torch.load(file))
    for each in (module, copy, deepcopy(module), pickle.loads(pickle.dumps(module))):
        each(VOCABULARY[:4])
        each.shrink(None)
        assert torch.equal(read(each), read(module))
    wide = deepcopy(module).double().to(torch.device("cpu"))
    assert wide.keys.dtype == torch.int64
    assert torch.equal(read(wide), read(module).double())


@pytest.mark.parametrize("optimizer", STATEFUL)
def test_a_slot_that_is_used_again_has_nothing_of_its_last_row(optimizer):
    """Rows that go and come back train like rows that were never there."""
    module = HashEmbedding(3, capacity=10, seed=1, eviction=TimeToLive(1))
    mine = MAKE[optimizer](module)
    train(module, mine, torch.tensor([1, 2]))
    for _ in range(2):
        train(module, mine, torch.tensor([2]))
    assert module.shrink(mine).tolist() == [1]
    fresh = HashEmbedding(3, capacity=10, seed=1)
    other = MAKE[optimizer](fresh)
    if optimizer == "SparseAdam":
        train(fresh, other, torch.tensor([2]))
        train(fresh, other, torch.tensor([2]))
        train(fresh, other, torch.tensor([2]))
    train(module, mine, torch.tensor([5]))
    train(fresh, other, torch.tensor([5]))
    assert module.slots(torch.tensor([5])).tolist() == [0]
    assert torch.equal(read(module, torch.tensor([5])), read(fresh, torch.tensor([5])))


@pytest.mark.parametrize("optimizer", ["SGD", *STATEFUL])
def test_what_was_exported_trains_on_alike(optimizer):
    """Whole, then what changed; into a table of another capacity whose optimizer has not made a step."""
    options = {"seed": 3, "eviction": TimeToLive(2), "admission": CountFilter(2)}
    module, copy = HashEmbedding(3, capacity=10, **options), HashEmbedding(3, capacity=40, **options)
    mine, other = MAKE[optimizer](module), MAKE[optimizer](copy)
    copy(VOCABULARY)
    copy(VOCABULARY)
    steps = draws((3,), 16)
    last = None
    for n, at in enumerate(steps):
        train(module, mine, VOCABULARY[at])
        if n % 3 == 2:
            module.shrink(mine)
        if n % 4 == 3:
            saved = module.export(last, mine)
            copy.restore(saved, other)
            last = saved.mark
            assert len(saved.rows.ids) == module.count() or saved.since is not None
    for at in draws((4,), 8):
        assert torch.equal(train(module, mine, VOCABULARY[at]), train(copy, other, VOCABULARY[at]))
        assert module.shrink(mine).sort().values.tolist() == copy.shrink(other).sort().values.tolist()
    assert torch.equal(read(module), read(copy))


def test_a_loaded_table_begins_with_a_whole_export():
    module = HashEmbedding(1, capacity=4)
    module(VOCABULARY[:2])
    mark = module.export().mark
    copy = HashEmbedding(1, capacity=4)
    copy.load_state_dict(module.state_dict())
    with pytest.raises(TableError, match=r"found since=1; .* Take a whole export"):
        copy.export(mark)
    assert copy.export().mark == 2


def test_scores():
    module = HashEmbedding(1, capacity=4, initial=Constant(1.0), admission=ShowClick(0.5), eviction=ScoreDecay(2.7441))
    module(VOCABULARY[:2])
    module.observe(VOCABULARY[:2], torch.tensor([10.0, 1.0]), torch.tensor([2.0, 0.0]))
    assert module(VOCABULARY[:2]).flatten().tolist() == [1, 0]
    assert module.shrink(None).tolist() == VOCABULARY[:1].tolist()


def test_state_that_is_sparse_is_refused_before_anything_changes():
    module = HashEmbedding(1, capacity=4, eviction=TimeToLive(1))
    optimizer = MAKE["momentum"](module)
    for i in (1, 2, 2):
        train(module, optimizer, torch.tensor([i]))
    with pytest.raises(TableError, match=r"^'momentum_buffer' of SGD is a sparse tensor; expected state with a row"):
        module.shrink(optimizer)
    assert module.count() == 2


def test_it_can_be_traced():
    """In training with what it writes to; in evaluation without."""
    module = HashEmbedding(3, capacity=9)
    state = dict(module.state_dict(keep_vars=True))

    def run(ids, *tensors):
        return torch.func.functional_call(module, dict(zip(state, tensors, strict=True)), (ids,))

    training = make_fx(run, tracing_mode="fake")(VOCABULARY, *state.values())
    assert module.count() == 0
    (node,) = [n for n in training.graph.nodes if n.target is torch.ops.syncwright.table_slots.default]
    assert (node.meta["val"].shape, node.meta["val"].dtype) == ((10,), torch.int64)
    evaluation = make_fx(lambda ids, *t: run(ids, *t), tracing_mode="fake")
    module.eval()
    assert torch.ops.syncwright.table_find.default in {
        n.target for n in evaluation(VOCABULARY, *state.values()).graph.nodes
    }
    module.train()
    with torch.no_grad():
        assert torch.equal(
            training(VOCABULARY[:9], *state.values()), rows(Normal(), 0, VOCABULARY[:9], 3, torch.float32)
        )
    assert module.count() == 9


def step(model, optimizer, ids, y):
    optimizer.zero_grad()
    loss = ((model(ids).sum(-1) - y) ** 2).mean()
    loss.backward()
    optimizer.step()
    return loss


def test_trainers_of_a_job_make_no_rows_and_read_those_that_there_are():
    """Frozen in evaluation mode it is a table with the rows that it has."""
    table = HashEmbedding(2, capacity=12, initial=Uniform(-1, 1))
    table(VOCABULARY)
    ids, y = VOCABULARY[:4], torch.arange(4.0)
    job = syncwright.loopback(step, table, SGD(table.parameters(), lr=0.1), plan="all_reduce", trainers=2)
    with pytest.raises(PlanError, match="makes rows for ids as they come, expected ParameterServer"):
        job.step([(ids[:2], y[:2]), (ids[2:], y[2:])])
    table.eval()
    alone = deepcopy(table)
    job = syncwright.loopback(step, table, SGD(table.parameters(), lr=0.1), plan="all_reduce", trainers=2)
    optimizer = SGD(alone.parameters(), lr=0.1)
    for _ in range(3):
        job.step([(ids[:2], y[:2]), (ids[2:], y[2:])])
        step(alone, optimizer, ids, y)
    job.sync()
    torch.testing.assert_close(table(VOCABULARY), alone(VOCABULARY))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="tells how much memory is touched on Linux only")
def test_a_large_capacity_takes_memory_as_rows_come():
    """1.3 GB of rows, and as much to find them."""
    before = resident_bytes()
    module = HashEmbedding(16, capacity=20_000_000)
    module(VOCABULARY)
    assert module.weight.nbytes > 1.2e9
    assert resident_bytes() - before < 2e8
    assert read(module).any(1).all()
