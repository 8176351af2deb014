"""The script of the jobs in test_jobs.py: `python job.py CASES FOLDER`, once per role, and what it is compared with.

Cases are joined by "+" and run one after another, each with a folder of its own.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import syncwright
from syncwright import AllGather, AllReduce, LocalSteps, ParameterServer, Rules, Shard
from syncwright.plan import Even, Optimizer
from syncwright.planning import make_plan
from syncwright.runtime.server import Server
from syncwright.runtime.sockets import Deadlines

ROLE, RANK = os.environ.get("SYNCWRIGHT_ROLE", "trainer"), os.environ.get("RANK", "0")
MIXED = Rules.of(AllReduce(), {"0.*": ParameterServer(partition=Even(2))})
GATHERED = Rules.of(AllReduce(), {"few.*": AllGather(), "many.*": AllGather("mean_by_touch")})
KEPT = Rules(Shard(3))
SHARDED = Rules.of(Shard(3, bucket_mb=0.0001), {"2.*": Shard(1), "0.bias": AllReduce()})
NESTEROV = Optimizer.of("SGD", lr=0.7, momentum=0.9, nesterov=True)
ALONE = Rules.of(LocalSteps(2, NESTEROV, start=1), {"2.bias": LocalSteps(3, start=1)})
AT_SERVERS = Rules.of(
    LocalSteps(2, NESTEROV, start=1, over=ParameterServer(partition=Even(2))),
    {"2.bias": LocalSteps(3, start=1, over=ParameterServer())},
)
EXAMPLES, BATCH = 37, 8  # the last batch has 5: parts of 3 and 2
HELD_OUT = 13  # in batches of 4: the last one has 1, so trainer 1's part is empty
PATIENT = Deadlines(join=100.0, wait=60.0, linger=1.0)


def build(width: int = 8) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 2))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def step(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = F.mse_loss(model(x), y)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    return loss


def data(examples: int, seed: int) -> TensorDataset:
    """Example i has i as its first number, so that it can be told which were seen."""
    x = torch.randn(examples, 6, generator=torch.Generator().manual_seed(seed))
    x[:, 0] = torch.arange(examples)
    return TensorDataset(x / 10, x[:, :2] * 0.1)


def batches(dataset: TensorDataset, size: int, shuffle: bool = False) -> DataLoader:
    return DataLoader(dataset, batch_size=size, shuffle=shuffle)


def after_plain_steps(steps: int) -> dict[str, object]:
    """What a run without Syncwright saves."""
    model, optimizer = build()
    for x, y in list(batches(data(16, 1), 4))[:steps]:
        step(model, optimizer, x, y)
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


# --- right jobs ----------------------------------------------------------------------------------------


def train(folder: Path, plan: object) -> syncwright.Trainer:
    """An epoch that goes on from a plain run; then evaluates, and goes back to a saved state; writes its report."""
    model, optimizer = build()
    trainer = syncwright.distribute(step, model, optimizer, plan=plan, compile=False, deadlines=PATIENT)  # type: ignore[arg-type]
    trainer.load_state_dict(after_plain_steps(2))
    torch.manual_seed(3 + trainer.rank)
    losses, seen = [], []
    for x, y in trainer.shard(batches(data(EXAMPLES, 0), BATCH, shuffle=True)):
        losses.append(trainer.step(x, y))
        seen += (10 * x[:, 0]).round().int().tolist()
    outputs = trainer.evaluate(lambda model, x, y: model(x), batches(data(HELD_OUT, 2), 4))
    state = trainer.state_dict()
    restored = goes_back(trainer, state)
    report = {"losses": losses, "seen": seen, "outputs": outputs, "state": state, "restored": restored}
    torch.save(report, folder / f"{trainer.rank}.pt")
    return trainer


def goes_back(trainer: syncwright.Trainer, saved: dict[str, object]) -> bool:
    """Whether a step from a saved state gives the same when the state is loaded and the step taken again."""
    batch = data(4, 5).tensors
    found = []
    for _ in range(2):
        trainer.load_state_dict(saved)
        trainer.step(*batch)
        found.append(trainer.state_dict())
    return same(found[0], found[1]) and not same(found[0], saved)


def same(a: object, b: object) -> bool:
    """Whether two state dicts are equal, bit for bit."""
    match a, b:
        case dict(), dict():
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        case list(), list():
            return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
        case torch.Tensor(), torch.Tensor():
            return torch.equal(a, b)
    return a == b


def mixed(folder: Path) -> None:
    """Trains; then goes on until Ctrl-C."""
    with train(folder, MIXED) as trainer:
        print("ready", os.getpid(), os.environ["SYNCWRIGHT_STORE"], os.environ["SYNCWRIGHT_SOCKETS"], flush=True)
        (folder / f"{trainer.rank}.ready").touch()
        for _ in count():
            trainer.step(*data(4, 5).tensors)


def sharded(folder: Path) -> None:
    """Every trainer keeps parts of its own."""
    with train(folder, SHARDED):
        pass


@contextmanager
def by_sockets() -> Iterator[None]:
    """Trainers share no memory."""
    os.environ["SYNCWRIGHT_SHARED_MEMORY"] = "0"
    yield
    del os.environ["SYNCWRIGHT_SHARED_MEMORY"]


def sharded_by_sockets(folder: Path) -> None:
    with by_sockets():
        sharded(folder)


def mixed_once(folder: Path) -> None:
    train(folder, MIXED).close()


def watched(folder: Path) -> None:
    """Goes on until it is told to stop: trainer 0 looks, and its loss tells the other."""
    with job(plan="parameter_server") as trainer:
        while True:
            told = trainer.rank == 0 and (folder / "stop").exists()
            x, y = BATCHES[0]
            loss = trainer.step(x, torch.full_like(y, 1e6) if told else y)
            (folder / f"{trainer.rank}.ready").touch()
            if float(loss) > 1e6:  # type: ignore[arg-type]
                break


def alone(folder: Path, plan: Rules = ALONE) -> None:
    """Trainers train alone; after the 5 steps, one since the last exchange, they end alike."""
    model, optimizer = build()
    given = {"plan": plan, "compile": False, "deadlines": PATIENT, "check_replicas": True}
    with syncwright.distribute(step, model, optimizer, **given) as trainer:  # type: ignore[arg-type]
        for x, y in trainer.shard(batches(data(EXAMPLES, 0), BATCH)):
            trainer.step(x, y)
        between = trainer.state_dict()["model"]
    torch.save({"between": between, "end": model.state_dict()}, folder / f"{trainer.rank}.pt")


def alone_at_servers(folder: Path) -> None:
    alone(folder, AT_SERVERS)


def tables() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(7)
    model = nn.ModuleDict({"few": nn.Embedding(50, 3), "many": nn.Embedding(400, 3), "head": nn.Linear(3, 1)})
    return model, torch.optim.Adagrad(model.parameters(), lr=0.1)


def products(model, optimizer, ids, y):
    optimizer.zero_grad()
    loss = F.mse_loss(model["head"](model["few"](ids % 50) * model["many"](ids)), y)
    loss.backward()
    optimizer.step()
    return loss


def lookups(rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A trainer's parts: of 20 or 3 examples, more from step to step, and in step 2 none for trainer 1."""
    generator = torch.Generator().manual_seed(rank)
    sizes = [0 if (step, rank) == (2, 1) else (20 if (step + rank) % 2 else 3) + 10 * step for step in range(4)]
    return [(torch.randint(0, 400, (n,), generator=generator), torch.randn(n, 1, generator=generator)) for n in sizes]


def gathered(folder: Path) -> None:
    """Rows of two tables are gathered, other gradients all-reduced."""
    model, optimizer = tables()
    given = {"plan": GATHERED, "compile": False, "deadlines": PATIENT, "check_replicas": True}
    with syncwright.distribute(products, model, optimizer, **given) as trainer:  # type: ignore[arg-type]
        losses = [trainer.step(*batch) for batch in lookups(trainer.rank)]
        torch.save({"losses": losses, "state": trainer.state_dict()}, folder / f"{trainer.rank}.pt")


def matrices() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 2, bias=False))
    return model, torch.optim.Muon(model.parameters(), lr=0.02)


def kept(folder: Path) -> None:
    """What cannot be cut one trainer keeps; the third keeps nothing."""
    model, optimizer = matrices()
    with syncwright.distribute(step, model, optimizer, plan=KEPT, compile=False, deadlines=PATIENT) as trainer:
        losses = [trainer.step(x, y) for x, y in trainer.shard(batches(data(EXAMPLES, 0), BATCH))]
        outputs = trainer.evaluate(lambda model, x, y: model(x), batches(data(HELD_OUT, 2), 4))
        report = {"losses": losses, "outputs": outputs, "state": trainer.state_dict()}
    torch.save(report, folder / f"{trainer.rank}.pt")


def kept_by_sockets(folder: Path) -> None:
    with by_sockets():
        kept(folder)


def early(folder: Path) -> None:
    """Without collectives a trainer may leave early: the others go on without it."""
    with job(plan="parameter_server") as trainer:
        losses = [float(trainer.step(*BATCHES[0])) for _ in range(2 if trainer.rank else 5)]  # type: ignore[arg-type]
    print(f"trainer {trainer.rank}: {len(losses)} steps, better: {losses[-1] < losses[0]}")


def one_compiles(folder: Path) -> None:
    """Trainer 1 takes longer over its program than anybody waits for anything else."""

    def before(number: int) -> None:
        if RANK == "1" and number == 2:
            with trainer._meeting.busy("compiling the step"):
                time.sleep(14.0)

    trainer = job(plan=MIXED, wait=8.0)
    run(trainer, before)


def ddp(folder: Path) -> None:
    """Compares with torch's DistributedDataParallel on the benchmark's workloads, but for the largest."""
    import torch.distributed as dist

    from bench.workloads import WORKLOADS

    dist.init_process_group("gloo")
    for workload in (WORKLOADS["mlp"], WORKLOADS["gpt"]):
        given = workload.batches(dist.get_rank())[:5]
        model = workload.model()
        wrapped, optimizer = nn.parallel.DistributedDataParallel(model), workload.optimizer(model, False)
        losses = []
        for batch in given:
            losses.append(loss_step(wrapped, optimizer, *batch))
        expected = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        model = workload.model()
        optimizer = workload.optimizer(model, False)
        with syncwright.distribute(loss_step, model, optimizer, compile=False, deadlines=PATIENT) as trainer:
            for batch in given:
                trainer.step(*batch)
            print(f"{workload.name} after 5 steps is equal to DDP: {same(trainer.state_dict(), expected)}")
    dist.destroy_process_group()


def loss_step(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = model(x, y)
    loss.backward()
    optimizer.step()
    return loss


# --- misuses -------------------------------------------------------------------------------------------

BATCHES = [data(8, seed).tensors for seed in range(4)]


def job(width: int = 8, plan: object = "all_reduce", check: bool = False, **seconds: float) -> syncwright.Trainer:
    deadlines = Deadlines(**({"join": 100.0, "wait": 60.0, "linger": 1.0} | seconds))
    how: dict = {"plan": plan, "compile": False, "deadlines": deadlines, "check_replicas": check}
    return syncwright.distribute(step, *build(width), **how)


def run(trainer: syncwright.Trainer, before: Callable[[int], object] = lambda number: None) -> None:
    """Four steps; `before` is called before each."""
    with trainer:
        for number, batch in enumerate(BATCHES):
            before(number)
            trainer.step(*batch)


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(trainer: syncwright.Trainer, communication: str) -> Callable[[int], None]:
    """Kills trainer 1 in its third step, where its first gradient is to be sent."""

    def before(number: int) -> None:
        if RANK == "1" and number == 2:
            client = trainer._session.replicas[0].client
            setattr(client, communication, die)

    return before


def trainer_killed_all_reduce(folder: Path) -> None:
    trainer = job()
    run(trainer, killed_at(trainer, "start"))


def server_killed(folder: Path) -> None:
    """Before, a plan that names more servers than there are."""
    try:
        run(job(plan=make_plan("parameter_server_balanced", syncwright.capture(step, *build(), *BATCHES[0]), 1, 2)))
    except syncwright.errors.SyncwrightError as error:
        print(f"caught {type(error).__name__}: {error}")
    handle = Server.handle

    def handle_or_die(self: Server, sender, message):
        return die() if self.step == 2 else handle(self, sender, message)

    Server.handle = handle_or_die  # type: ignore[method-assign,assignment]
    run(job(plan="parameter_server"))


def another_model(folder: Path) -> None:
    run(job(width=9 if RANK == "1" else 8))


def never_starts(folder: Path) -> None:
    """Trainer 0 of 2, started by hand: first where the port is taken, then where trainer 1 never comes."""
    try:
        job()
    except syncwright.errors.SyncwrightError as error:
        print(f"caught {type(error).__name__}: {error}")
    os.environ["MASTER_PORT"] = os.environ["FREE_PORT"]
    run(job(join=2.0, wait=2.0))


def stopped(folder: Path) -> None:
    def before(number: int) -> None:
        if RANK == "1" and number == 2:
            time.sleep(2.5)  # so that a heartbeat has said where it is
            os.kill(os.getpid(), signal.SIGSTOP)

    run(job(wait=12.0), before)


def raises(folder: Path) -> None:
    def before(number: int) -> None:
        if RANK == "1" and number == 2:
            raise ValueError("the third file is empty")

    run(job(), before)


def server_never_steps(folder: Path) -> None:
    if ROLE == "trainer":
        run(job(plan="parameter_server", join=4.0))


def leaves_early(folder: Path) -> None:
    with job() as trainer:
        for batch in BATCHES[: 2 if trainer.rank else 4]:
            trainer.step(*batch)


def drifts(folder: Path) -> None:
    """Something writes to a value of trainer 1."""

    def before(number: int) -> None:
        if RANK == "1" and number == 2:
            trainer._session.replicas[0].values["2.bias"].add_(1e-3)  # type: ignore[union-attr]

    trainer = job(check=True)
    run(trainer, before)


def raises_outside(folder: Path) -> None:
    """An error ends a script that has no `with` block."""
    trainer = job(plan="parameter_server")
    trainer.step(*BATCHES[0])
    raise ValueError("the third file is empty")


def forgets_to_close(folder: Path) -> None:
    trainer = job(plan="parameter_server")
    for batch in BATCHES:
        trainer.step(*batch)


if __name__ == "__main__":
    for case in sys.argv[1].split("+"):
        own = Path(sys.argv[2]) / case
        own.mkdir(exist_ok=True)
        globals()[case](own)
