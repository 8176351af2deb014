"""A job in which nobody waits and trainer 0 ends long before trainer 1.

arguments: a folder, where each writes what it ends with, and "async" | "geo"
"""

import sys
import time
from pathlib import Path

import torch

import syncwright
from syncwright import Rules
from syncwright.runtime.deadlines import Deadlines
from tests.scripts.paused import Scalar, step, sync_of

STEPS = (3, 10)

if __name__ == "__main__":
    model = Scalar()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    plan = Rules(sync_of(sys.argv[2]))
    with syncwright.distribute(
        step, model, optimizer, plan=plan, compile=False, deadlines=Deadlines(wait=4)
    ) as trainer:
        for _ in range(STEPS[trainer.rank]):
            trainer.step(torch.ones(1))
            time.sleep(trainer.rank)
    (Path(sys.argv[1]) / f"{trainer.rank}.value").write_text(str(model.w.item()))
