"""A server's tables that lie below one another in one: given and asked for each by its own name. Changes as they are given."""

from __future__ import annotations

from dataclasses import replace

import torch

from syncwright.job import Job
from syncwright.program import Variable
from syncwright.runtime.large_pages import memory_for
from syncwright.runtime.messages import Message, Start, Value
from syncwright.runtime.records import Records


class Below:
    """See `Job.below`: tables that `join_tables` has joined, and their state per row.

    records  of what was deferred, from which parts are made
    """

    def __init__(self, job: Job, rank: int, records: Records):
        self._holds = {v.name: v for v in job.servers[rank].holds}
        self._parts = {name: part for name, part in job.below.items() if part.whole in self._holds}
        self._records = records
        self._begun: dict[str, tuple[torch.Tensor, set[str]]] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def whole(self, name: str) -> str:
        """What a table is a part of."""
        return str(self._parts[name].whole)

    def form(self, name: str) -> Variable:
        """A table as if it were kept alone."""
        return replace(self._parts[name], selection=None)

    def rows(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """A table's rows of the value of what it is a part of."""
        return whole[slice(*self._parts[name].part)]  # type: ignore[misc]

    def give(self, message: Message) -> torch.Tensor | None:
        """Takes what a table begins with; the value of what it is a part of, once all its parts are there."""
        header = message.header
        assert isinstance(header, Value | Start), "looked at before"
        name, whole = header.channel, self.whole(header.channel)
        if whole not in self._begun:
            parts = {each for each, part in self._parts.items() if part.whole == whole}
            form = self._holds[whole]
            self._begun[whole] = memory_for(form.shape, form.dtype), parts
        memory, missing = self._begun[whole]
        own = self.rows(name, memory)
        if isinstance(header, Start):
            self._records.start(self.form(name), header, own)
        else:
            own.copy_(message.tensor)  # type: ignore[arg-type]
        missing.discard(name)
        return None if missing else self._begun.pop(whole)[0]
