"""Write the training step for one device; choose per variable how it is kept in sync on many."""

from syncwright import nn as nn
from syncwright import optim as optim
from syncwright.capture import capture
from syncwright.deferred import deferred
from syncwright.plan import AllGather, AllReduce, Local, LocalSteps, ParameterServer, Plan, Rules, Shard
from syncwright.program import Program, Role, Variable
from syncwright.runtime.loopback import loopback
from syncwright.runtime.trainer import Trainer, distribute

__all__ = [
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
