"""A job in which trainer 1 is lost or pauses after three steps: what each trainer has done stands in files.

arguments: a folder, "sync" | "async" | a staleness | "local_steps" | "geo", and the signal that trainer 1 sends itself
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

import syncwright
from syncwright import LocalSteps, ParameterServer, Rules
from syncwright.plan import Geo, Sync
from syncwright.runtime.deadlines import Deadlines

STEPS, PAUSED_AT = 12, 3


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w * x


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = model(x).mean()
    loss.backward()
    optimizer.step()
    return loss


def sync_of(mode: str) -> Sync:
    match mode:
        case "local_steps":
            return LocalSteps(2, over=ParameterServer())
        case "geo":
            return LocalSteps(2, Geo(), over=ParameterServer())
        case "sync" | "async":
            return ParameterServer(mode=mode)
    return ParameterServer(mode="async", staleness=int(mode))


def main(folder: Path, mode: str, number: int) -> None:
    sync = sync_of(mode)
    model = Scalar()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    deadlines = Deadlines(wait=15)
    with syncwright.distribute(step, model, optimizer, plan=Rules(sync), compile=False, deadlines=deadlines) as trainer:
        (folder / f"{trainer.rank}.pid").write_text(str(os.getpid()))
        for done in range(STEPS):
            (folder / f"{trainer.rank}.steps").write_text(str(done))
            if trainer.rank == 1 and done == PAUSED_AT:
                if mode == "async":
                    trainer.state_dict()  # answered after the last push is taken, which otherwise may be lost with its sender
                os.kill(os.getpid(), number)
            trainer.step(torch.ones(1))
        (folder / f"{trainer.rank}.steps").write_text(str(STEPS))
    (folder / f"{trainer.rank}.value").write_text(str(model.w.item()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], signal.Signals[sys.argv[3]])
