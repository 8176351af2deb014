"""Calls distribute and never steps."""

import torch

import syncwright

model = torch.nn.Linear(2, 1)
syncwright.distribute(lambda model, optimizer: None, model, torch.optim.SGD(model.parameters(), lr=0.1))
