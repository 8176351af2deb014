"""Training steps that cannot be captured, and objects that cannot be trained: the cases of tests/test_errors.py."""

from __future__ import annotations

import logging

import torch
from torch import nn
from torch.nn import functional as F

FACTOR = torch.tensor([2.0, 3.0])
SEEN: list[float] = []


def plain(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = F.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    return loss


def branch_on_tensor(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = F.mse_loss(model(x), y)
    if loss.isnan():
        return loss
    loss.backward()
    optimizer.step()
    return loss


def branch_on_item(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = F.mse_loss(model(x), y)
    if loss.item() > 100.0:
        loss = loss / 2
    loss.backward()
    optimizer.step()
    return loss


def float_of_tensor(model, optimizer, x, y):
    loss = F.mse_loss(model(x), y)
    SEEN.append(float(loss))
    loss.backward()
    optimizer.step()
    return loss


def to_numpy(model, optimizer, x, y):
    loss = F.mse_loss(model(x), y)
    SEEN.append(loss.detach().numpy())
    loss.backward()
    optimizer.step()
    return loss


def prints(model, optimizer, x, y):
    loss = F.mse_loss(model(x), y)
    print("loss", loss)
    loss.backward()
    optimizer.step()
    return loss


def prints_item(model, optimizer, x, y):
    loss = F.mse_loss(model(x), y)
    print("loss", loss.item())
    loss.backward()
    optimizer.step()
    return loss


def logs(model, optimizer, x, y):
    loss = plain(model, optimizer, x, y)
    logging.getLogger("misuse").error("loss %s", loss)
    return loss


def formats(model, optimizer, x, y):
    loss = F.mse_loss(model(x), y)
    SEEN.append(len(f"{loss}"))
    loss.backward()
    optimizer.step()
    return loss


def formats_with_digits(model, optimizer, x, y):
    loss = F.mse_loss(model(x), y)
    SEEN.append(len(f"{loss:.3f}"))
    loss.backward()
    optimizer.step()
    return loss


def formats_item(model, optimizer, x, y):
    loss = F.mse_loss(model(x), y)
    SEEN.append(len(f"{loss.item():.3f}"))
    loss.backward()
    optimizer.step()
    return loss


def scheduled(scheduler):
    def step(model, optimizer, x, y):
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        scheduler.step()
        return loss

    return step


def changes_rate(model, optimizer, x, y):
    loss = F.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] *= 0.5
    return loss


def closure(model, optimizer, x, y):
    def evaluate():
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    return optimizer.step(evaluate)


def tensor_from_outside(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = (F.mse_loss(model(x), y, reduction="none") * FACTOR).mean()
    loss.backward()
    optimizer.step()
    return loss


def no_zero_grad(model, optimizer, x, y):
    loss = F.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    return loss


def returns_constant(model, optimizer, x, y):
    plain(model, optimizer, x, y)
    return {"loss": 1.0}


def returns_nothing(model, optimizer, x, y):
    plain(model, optimizer, x, y)


def wrong_module(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = F.mse_loss(model.hed(x), y)
    loss.backward()
    optimizer.step()
    return loss


def scaled(scaler):
    def step(model, optimizer, x, y):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss

    return step


def scaled_without_update(scaler):
    def step(model, optimizer, x, y):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        return loss

    return step


def scaled_with_closure(scaler):
    def step(model, optimizer, x, y):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer, lambda: loss)
        scaler.update()
        return loss

    return step


def returns_matrix(model, optimizer, x, y):
    plain(model, optimizer, x, y)
    return x.t() @ x


def decays_by_loss(model, optimizer, x, y):
    loss = plain(model, optimizer, x, y)
    with torch.no_grad():
        model.weight.mul_(1 - 0.1 * loss)
    return loss


def seeds(model, optimizer, x, y):
    torch.manual_seed(1)
    return plain(model, optimizer, x + torch.rand(1), y)


def rewinds(model, optimizer, x, y):
    state = torch.get_rng_state()
    loss = plain(model, optimizer, x + torch.rand(1), y)
    torch.set_rng_state(state)
    return loss


def draws_otherwise(model, optimizer, x, y):
    state = torch.get_rng_state()
    loss = plain(model, optimizer, x + torch.rand(1), y)
    torch.set_rng_state(state)
    return loss + torch.rand(2).sum()


class Labelled(torch.optim.SGD):
    """Keeps a word in its state."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["phase"] = "warm"
        return super().step(closure)


class Sudden(torch.optim.Optimizer):
    """Takes a first step that is twice as long as all later ones."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                parameter.add_(parameter.grad, alpha=-group["lr"] * (1 if state else 2))
                state["last"] = parameter.grad.clone()


class LateState(torch.optim.Optimizer):
    """Makes a state at its second update that the first did not make."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if "count" in state:
                    state["average"] = parameter.clone()
                state["count"] = torch.ones(())
                parameter.sub_(parameter.grad, alpha=group["lr"])


class LooksLikeRate(nn.Module):
    """A parameter whose name is a hyper-parameter's."""

    def __init__(self):
        super().__init__()
        inner = nn.Module()
        inner.register_parameter("lr", nn.Parameter(torch.zeros(2)))
        self.optimizer = nn.ModuleList([inner])

    def forward(self, x):
        return x[:, :2] + self.optimizer[0].lr
