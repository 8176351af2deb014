"""deferred(): what is recorded is what would have been made, bit for bit, whole and in any part."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import syncwright
from syncwright.deferred import record
from syncwright.deferred.record import CHUNK, digest
from syncwright.deferred.replay import Replay
from syncwright.deferred.tensor import Deferred, put_away, real, record_of
from syncwright.errors import DeferredError

ABOVE = 1000
ROWS, WIDTH = 100_003, 13  # more elements than a chunk, and no multiple of 16


def linear(change: Callable[[torch.Tensor], object]) -> Callable[[], nn.Module]:
    """A layer whose weight is initialised once more."""

    def build() -> nn.Module:
        layer = nn.Linear(1003, 1100)
        with torch.no_grad():
            change(layer.weight)
        return layer

    return build


class Own(nn.Module):
    """Tensors of every factory, joined in arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn = nn.Parameter(torch.randn(3000, 7) * 0.1)
        self.doubles = nn.Parameter(torch.rand(3000, 7, dtype=torch.float64).sub_(0.5))
        self.other = nn.Parameter(torch.rand_like(self.drawn) - self.drawn.detach() / 3)
        self.halves = nn.Parameter(torch.empty(3000, 7, dtype=torch.bfloat16).normal_(generator=seeded()))
        self.register_buffer("whole", torch.randint(3, 900, (4000,)))
        self.register_buffer("below", torch.randint(900, (4000,)))
        self.register_buffer("filled", torch.full((3000, 2), 3))
        self.register_buffer("normal", torch.normal(1.0, 2.0, (3000, 2)))
        self.register_buffer("ones", torch.ones_like(self.drawn).mul_(torch.tensor(3.0)))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(9)


def row_by_row(weight: torch.Tensor) -> None:
    weight[7].fill_(2.0)
    weight[9].copy_(torch.arange(weight.shape[1]))
    weight[3:90].normal_()
    weight[1:].mul_(0.5).add_(weight[1:])
    weight[2].normal_()  # fewer numbers than are drawn in groups, where a row is one


init = nn.init
MADE: dict[str, Callable[[], nn.Module]] = {
    "Embedding": lambda: nn.Embedding(ROWS, WIDTH),
    "Embedding with a padding row": lambda: nn.Embedding(ROWS, WIDTH, padding_idx=5),
    "Embedding of doubles": lambda: nn.Embedding(ROWS, WIDTH, padding_idx=5, dtype=torch.float64),
    "Embedding made double": lambda: nn.Embedding(ROWS, WIDTH, padding_idx=5).double(),
    "EmbeddingBag": lambda: nn.EmbeddingBag(ROWS, WIDTH, padding_idx=0),
    "several, made half": lambda: nn.Sequential(nn.Linear(1003, 170), nn.Embedding(3000, 4)).half(),
    "LSTM": lambda: nn.LSTM(64, 64),
    "copied": lambda: copy.deepcopy(nn.Linear(1003, 1100)),
    "all factories": Own,
    "uniform_": linear(lambda w: init.uniform_(w, -0.3, 0.7)),
    "normal_": linear(lambda w: init.normal_(w, 0.1, 0.02)),
    "constant_": linear(lambda w: init.constant_(w, 0.3)),
    "ones_": linear(init.ones_),
    "zeros_": linear(init.zeros_),
    "xavier_uniform_": linear(init.xavier_uniform_),
    "xavier_normal_": linear(init.xavier_normal_),
    "kaiming_uniform_": linear(init.kaiming_uniform_),
    "kaiming_normal_": linear(init.kaiming_normal_),
    "trunc_normal_, nothing rejected": linear(lambda w: init.trunc_normal_(w, std=0.02)),
    "trunc_normal_, drawn again": linear(init.trunc_normal_),
    "trunc_normal_, far from the mean": linear(lambda w: init.trunc_normal_(w, a=2, b=3)),
    "arithmetic with groups": linear(lambda w: w.mul_(0.3).add_(1).clamp_(0, 1).pow_(0.3).sigmoid_()),
    "row by row": linear(row_by_row),
    "geometric_": linear(lambda w: w.geometric_(0.3).log_normal_().cauchy_()),
    "masked": linear(lambda w: w.masked_fill_(w > 0.01, 0.5)),
}


def built(make: Callable[[], nn.Module], deferred: bool) -> tuple[nn.Module, torch.Tensor]:
    """A model, and what is drawn after it."""
    torch.manual_seed(5)
    if not deferred:
        return make(), torch.randn(5)
    with syncwright.deferred(above=ABOVE):
        model = make()
    return model, torch.randn(5)


@pytest.mark.parametrize("name", MADE)
def test_what_is_recorded_is_what_would_have_been_made(name: str) -> None:
    plain, drawn = built(MADE[name], deferred=False)
    recorded, drawn_after = built(MADE[name], deferred=True)
    assert torch.equal(drawn, drawn_after)
    large = [tensor for tensor in recorded.state_dict().values() if tensor.numel() > ABOVE]
    assert large
    assert all(isinstance(tensor, Deferred) for tensor in large)

    held = dict(recorded.named_parameters())
    syncwright.deferred.build(recorded)
    for key, tensor in plain.state_dict().items():
        found = recorded.state_dict()[key]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found, tensor), key
    assert all(parameter is held[key] for key, parameter in recorded.named_parameters())
    assert all(type(parameter) is nn.Parameter for parameter in recorded.parameters())


@pytest.fixture(scope="module")
def table() -> tuple[torch.Tensor, Deferred]:
    """What a table is, and its record: draws, arithmetic that works on groups, a row that is set."""

    def make() -> nn.Module:
        module = nn.Embedding(ROWS, WIDTH, padding_idx=70_000)
        module.weight.data.sigmoid_()
        return module

    plain, recorded = built(make, deferred=False)[0], built(make, deferred=True)[0]
    return plain.weight.detach(), recorded.weight.detach()  # type: ignore[return-value]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_rows_are_made_alone(table, data) -> None:
    plain, recorded = table
    start = data.draw(st.integers(0, ROWS - 1))
    stop = data.draw(st.integers(start + 1, min(ROWS, start + 2 * CHUNK // WIDTH)))
    assert torch.equal(real(recorded[start:stop]), plain[start:stop])


def test_ranges_in_order_draw_each_chunk_once(table, monkeypatch) -> None:
    plain, recorded = table
    drawn: list[int] = []
    chunk = Replay._chunk

    def counted(self, record, index, numel):
        if self._last.get(id(record), (None,))[0] != index:
            drawn.append(index)
        return chunk(self, record, index, numel)

    monkeypatch.setattr(Replay, "_chunk", counted)
    replay, step = Replay(record_of(recorded)), 997 * WIDTH
    parts = [replay.values(at, min(at + step, plain.numel())) for at in range(0, plain.numel(), step)]
    assert torch.equal(torch.cat(parts).view(plain.shape), plain)
    assert drawn == sorted(set(drawn))
    assert len(drawn) > 1


def test_no_memory_is_taken_for_what_is_deferred() -> None:
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and not isinstance(made, Deferred) and made.device.type == "cpu":
                self.numel = max(self.numel, made.untyped_storage().nbytes() // made.dtype.itemsize)
            return made

    with Largest() as largest, syncwright.deferred(above=ABOVE):
        torch.zeros(2**40, 4).fill_(1.0).mul_(2)  # of 16 TB
        optimizer = torch.optim.Adagrad(nn.Embedding(3_000_000, 4).parameters())
    assert largest.numel <= CHUNK + record.LEAST
    assert all(isinstance(s["sum"], Deferred) for s in optimizer.state.values())


@pytest.mark.parametrize("above", [ABOVE, 2**22])
def test_small_tensors_are_made_at_once(above: int) -> None:
    with syncwright.deferred(above=above):
        layer = nn.Linear(20, 50)
    assert type(layer.weight) is nn.Parameter


def test_a_record_is_known_by_its_digest() -> None:
    def weight(seed: int, change: Callable[[torch.Tensor], object] = lambda w: None) -> Deferred:
        torch.manual_seed(seed)
        with syncwright.deferred(above=ABOVE):
            module = nn.Embedding(3000, 4, padding_idx=1)
        change(module.weight.data)
        return module.weight  # type: ignore[return-value]

    changes = [
        lambda w: None,
        lambda w: w.mul_(2),
        lambda w: w.mul_(3),
        lambda w: w[3].zero_(),
        lambda w: w[4].zero_(),
        lambda w: w[3].copy_(torch.tensor([1.0, 2, 3, 4])),
        lambda w: w[3].copy_(torch.tensor([1.0, 2, 3, 5])),
    ]
    found = [digest(record_of(weight(7, change))) for change in changes]
    assert None not in found
    assert len(set(found)) == len(changes)
    assert found == [digest(record_of(weight(7, change))) for change in changes]
    assert digest(record_of(weight(8))) != found[0]
    assert digest(record_of(weight(7, lambda w: w.copy_(torch.zeros(3000, 4))))) is not None
    large = 2 * CHUNK
    with syncwright.deferred(above=ABOVE):
        given_values = torch.empty(large)
    given_values.copy_(torch.ones(large))
    assert digest(record_of(given_values)) is None  # type: ignore[arg-type]


def test_a_state_can_be_loaded_into_it() -> None:
    plain, recorded = built(MADE["Embedding"], False)[0], built(MADE["Embedding"], True)[0]
    changed = {"weight": plain.state_dict()["weight"] + 1}
    recorded.load_state_dict(changed)
    expected = changed["weight"].clone()
    changed["weight"].zero_()
    syncwright.deferred.build(recorded)
    assert torch.equal(recorded.state_dict()["weight"], expected)


def test_data_can_be_set() -> None:
    recorded, _ = built(MADE["Embedding"], True)
    parameter, values = recorded.weight, torch.ones(ROWS, WIDTH)
    recorded.weight.data = values
    assert recorded.weight is parameter
    assert type(parameter) is nn.Parameter
    assert torch.equal(parameter, values)


REFUSED: dict[str, tuple[Callable[[torch.Tensor], object], str]] = {
    "read": (lambda w: w.sum(), "aten.sum.default"),
    "qr": (init.orthogonal_, "aten.linalg_qr.default"),
    "scattered rows": (lambda w: w.index_fill_(0, torch.tensor([1, 3]), 0), "aten.index_fill_"),
    "columns": (lambda w: w[:, 3].zero_(), "no run of rows"),
    "broadcast": (lambda w: w.mul_(torch.ones(1003)), "aten.mul_.Tensor"),
    "drawn by another library": (lambda w: w.exponential_(), "aten.exponential_.default"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_recorded_is_named(name: str) -> None:
    change, named = REFUSED[name]
    with pytest.raises(DeferredError, match=named):
        built(linear(change), deferred=True)


def test_it_cannot_be_saved_before_it_is_made() -> None:
    recorded, _ = built(MADE["Embedding"], True)
    with pytest.raises(DeferredError, match="cannot be saved"):
        pickle.dumps(recorded.weight)


def test_what_is_elsewhere_says_where() -> None:
    recorded, _ = built(MADE["Embedding"], True)
    put_away(recorded.weight, "ask the servers")  # type: ignore[arg-type]
    for read in (lambda: recorded.weight.sum(), lambda: real(recorded.weight), lambda: real(recorded.weight[3])):
        with pytest.raises(DeferredError, match="ask the servers"):
            read()
    assert digest(record_of(recorded.weight)) is None  # type: ignore[arg-type]
    recorded.weight.data.fill_(1.0)
    assert torch.equal(real(recorded.weight[3]), torch.ones(WIDTH))


def test_above_is_a_number_of_elements() -> None:
    with pytest.raises(ValueError, match="above=-1"):
        syncwright.deferred(above=-1)
