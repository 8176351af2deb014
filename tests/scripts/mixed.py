"""A table on a server beside dense layers by all-reduce, with a clipped norm over both."""

import sys

import torch
import torch.nn.functional as F
from torch import nn

import syncwright

torch.manual_seed(0)
model = nn.ModuleDict({"table": nn.Embedding(13, 4), "norm": nn.BatchNorm1d(4), "head": nn.Linear(4, 3)})
model["norm"].eval()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
ids, labels = torch.randint(0, 13, (6, 5)), torch.randint(0, 3, (6,))


def step(model, optimizer, ids, labels):
    optimizer.zero_grad()
    loss = F.cross_entropy(model["head"](model["norm"](model["table"](ids).mean(1))), labels)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    return loss


plan = syncwright.Rules.of(syncwright.AllReduce(), {"table.*": syncwright.ParameterServer()})
with syncwright.distribute(step, model, optimizer, plan=plan) as trainer:
    print("arguments:", *sys.argv[1:])
    for part in trainer.shard([(ids, labels)] * 2):
        loss = trainer.step(*part)
    sent = [str(node.target) for node in trainer.job.trainer["step"].graph.nodes].count("syncwright.all_reduce.default")
    print(f"loss {loss.item():.6f}, {sent} all-reduces")
