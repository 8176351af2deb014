"""One job's way through a trainer's outlet, where several jobs share it: what it sends says of which job it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from syncwright.runtime.messages import Address, Message
from syncwright.runtime.transport import Gathered, HostWork, Outlet, Scattered, Work


class Lane:
    """See `transport.Outlet`. Changes: notes at which step of the trainer it is.

    job   which: the n-th exchange's is n, counted from 1 (see `Message`)
    step  for those who ask how far this trainer is: exchanges number theirs apart
    """

    def __init__(self, outlet: Outlet, job: int) -> None:
        self.me, self.job, self.step = outlet.me, job, 0
        self._outlet = outlet

    def send(self, to: Address, message: Message) -> None:
        self._outlet.send(to, Message(message.header, message.tensor, self.job))

    def flush(self) -> None:
        self._outlet.flush()

    def meet(self, groups: Mapping[str, Sequence[Sequence[int]]]) -> None:
        self._outlet.meet(groups)

    def all_reduce(self, tensor: torch.Tensor, note: str, group: str = "") -> Work:
        return self._outlet.all_reduce(tensor, note, group)

    def reduce_scatter(self, tensors: Sequence[torch.Tensor], note: str, group: str = "") -> Scattered:
        return self._outlet.reduce_scatter(tensors, note, group)

    def reduce_to(self, tensors: Sequence[torch.Tensor], keeper: int, note: str, group: str = "") -> Scattered:
        return self._outlet.reduce_to(tensors, keeper, note, group)

    def give(
        self, nbytes: int, pieces: Sequence[tuple[int, torch.Tensor]], keeper: int, note: str, group: str = ""
    ) -> Gathered:
        return self._outlet.give(nbytes, pieces, keeper, note, group)

    def sum_on_host(self, tensor: torch.Tensor, note: str) -> HostWork:
        return self._outlet.sum_on_host(tensor, note)

    def is_first_on_host(self) -> bool:
        return self._outlet.is_first_on_host()

    def give_on_host(self, tensor: torch.Tensor, note: str) -> None:
        self._outlet.give_on_host(tensor, note)

    def take_on_host(self, shape: list[int], dtype: torch.dtype, note: str) -> torch.Tensor | None:
        return self._outlet.take_on_host(shape, dtype, note)

    def leave_host(self) -> None:
        self._outlet.leave_host()

    def all_gather(self, whole: torch.Tensor, part: torch.Tensor, note: str, group: str = "") -> Work:
        return self._outlet.all_gather(whole, part, note, group)

    def gather(self, nbytes: int, pieces: Sequence[tuple[int, torch.Tensor]], note: str, group: str = "") -> Gathered:
        return self._outlet.gather(nbytes, pieces, note, group)

    def broadcast(self, tensor: torch.Tensor, note: str) -> None:
        self._outlet.broadcast(tensor, note)

    def progress(self, step: int, node: str) -> None:
        self._outlet.progress(self.step, node)
