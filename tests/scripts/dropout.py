"""Modules whose result on a whole batch is not that on its parts."""

import torch
from torch import nn

import syncwright

torch.manual_seed(0)
layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 1))
optimizer = torch.optim.SGD(layers.parameters(), lr=0.1, momentum=0.9)


def step(model, optimizer, x):
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss


trainer = syncwright.distribute(step, layers, optimizer)
trainer.step(torch.randn(7, 4))
