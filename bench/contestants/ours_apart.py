"""Syncwright as if every trainer had a host of its own: what trainers send each other goes through Gloo over TCP."""

from __future__ import annotations

import os

from bench.contestants import Running, Seat
from bench.contestants.ours import step
from bench.contestants.ours_served import refusing, rules
from bench.workloads import Workload


def start(workload: Workload, seat: Seat, plan: str, compile: bool) -> Running:
    """plan: rules in YAML. The ranks find each other through torchrun's variables."""
    os.environ["SYNCWRIGHT_SHARED_MEMORY"] = "0"
    from syncwright import distribute

    model = workload.model()
    optimizer = workload.optimizer(model, False)
    trainer = refusing(distribute)(step, model, optimizer, plan=rules(plan), compile=compile)
    return Running(refusing(trainer.step), trainer.close)
