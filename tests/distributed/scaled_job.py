"""A step with a loss scale, in processes: what `test_scaling_processes` starts. Trainer 1 has one batch that is not finite."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import syncwright
from tests import test_scaling as given


def main(folder: Path, plan: str) -> None:
    scaler, model = given.scaler_of(), given.Net()
    numbers = []
    step = given.scaled(scaler, clip=True)
    with syncwright.distribute(
        step, model, given.ADAMW(model.parameters()), plan=given.PLANS[plan][0], compile=False, check_replicas=True
    ) as trainer:
        for parts in given.batches():
            trainer.step(*parts[trainer.rank])
            trainer.sync()
            numbers.append((scaler.get_scale(), scaler.state_dict()["_growth_tracker"]))
    torch.save({"numbers": numbers, "model": model.state_dict()}, folder / f"{trainer.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
