"""Run by test_gathers: many gathers under way at once, of many sizes, checked against what they must give."""

import os
import sys

import torch

from syncwright.runtime.membership import membership
from syncwright.runtime.rendezvous import Rendezvous
from syncwright.runtime.sockets import Deadlines, SocketTransport

ROUNDS, UNDER_WAY = 20, 24


def main() -> None:
    torch.set_num_threads(1)
    place = membership(os.environ)
    transport = SocketTransport(place.me, Rendezvous(place, 0), 0, deadlines=Deadlines(wait=60))
    for turn in range(ROUNDS):
        works, laid_out = [], []
        for index in range(UNDER_WAY):
            numel = 1 + (turn * 7919 + index * 104729) % 50_000
            part = torch.full((numel,), float(place.me.rank * 1000 + turn * 100 + index))
            whole = torch.empty(place.trainers * numel)
            works.append((transport.all_gather(whole, part, f"{turn}.{index}"), whole, numel, turn * 100 + index))
            pieces = [(0, torch.tensor([numel])), (8, part)]
            laid_out.append((transport.gather(8 + part.nbytes, pieces, f"pieces {index}"), numel, turn * 100 + index))
        for work, whole, numel, mark in works:
            work.done()
            expected = torch.arange(place.trainers).repeat_interleave(numel) * 1000.0 + mark
            if not torch.equal(whole, expected):
                sys.exit(f"a gather of {numel} elements gave other numbers than were sent")
        for gathered, numel, mark in laid_out:
            gathered.done()
            for rank, part in enumerate(gathered.parts):
                count, given = int(part[:8].view(torch.int64)), part[8 : 8 + 4 * numel].view(torch.float32)
                if count != numel or not bool((given == rank * 1000.0 + mark).all()):
                    sys.exit(f"pieces of {numel} elements came as others than were sent")
            gathered.release()
    transport.close()


if __name__ == "__main__":
    main()
