"""A job whose trainers push and pull once for each host, and leave after different numbers of steps.

arguments: a folder, where each writes the hosts of its plan, what its steps returned, how many pushes and pulls it has sent,
and the value with which it ended
"""

import json
import sys
from pathlib import Path

import torch

import syncwright
from syncwright import ParameterServer, Rules
from syncwright.runtime.deadlines import Deadlines
from syncwright.runtime.messages import Address, Kind, Pull, Push
from tests.scripts.paused import Scalar, step

STEPS = (1, 3, 4, 2)

if __name__ == "__main__":
    model = Scalar()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    plan, deadlines = Rules(ParameterServer(merge_on_host=True, copy_on_host=True)), Deadlines(wait=60)
    with syncwright.distribute(step, model, optimizer, plan=plan, compile=False, deadlines=deadlines) as trainer:
        x = torch.full((1,), trainer.rank + 1.0)
        losses = [float(trainer.step(x)) for _ in range(STEPS[trainer.rank])]  # type: ignore[arg-type]
        sent = trainer._transport.traffic.flows[Address(Kind.SERVER, 0)].sent  # type: ignore[union-attr]
    report = trainer.plan.hosts, losses, sent[Push].messages, sent[Pull].messages, model.w.item()
    (Path(sys.argv[1]) / f"{trainer.rank}.json").write_text(json.dumps(report))
