"""Click logs in Criteo's text format, as records that are read as fast as the disk gives them.

    python examples/criteo.py train.txt.gz --to out/criteo          (several files: in this order)

A line of the text holds, between tabs: 1 or 0 (clicked or not), 13 integers, 26 categories as 8 hexadecimal digits; what
is not known is empty. A *part* is a file `part-00000.npy`: an array of `RECORD`s, which numpy maps into memory.
Each trainer reads parts of its own, so a machine needs only those of its trainers (and the last, to evaluate).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

COUNTS, CATEGORIES = 13, 26
RECORD = np.dtype([("clicked", "u1"), ("counts", "<f4", COUNTS), ("ids", "<u4", CATEGORIES)])
"""157 bytes. `counts`: log(1 + n), 0 where n is not known or negative. `ids`: 0 where it is not known."""

CARDINALITIES = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194),
    *(27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)
"""How many different values each category has in the seven days of Criteo's display advertising challenge."""

Batch = tuple[Tensor, Tensor, Tensor]


# ---------------------------------------------------------------------------------------- from text to parts


def records(texts: Iterable[Path], at_once: int = 100_000) -> Iterator[np.ndarray]:
    """The lines of text files, also .gz, as arrays of at most `at_once` `RECORD`s.

    Raises `ValueError`, which names the file, for what is not this format.
    """
    for path in texts:
        try:
            for frame in pd.read_csv(path, sep="\t", header=None, dtype=str, keep_default_na=False, chunksize=at_once):
                yield _record(frame)
        except ValueError as error:
            raise ValueError(f"{path}: expected lines in Criteo's format: {error}") from error


def _record(frame: pd.DataFrame) -> np.ndarray:
    if frame.shape[1] != 1 + COUNTS + CATEGORIES:
        raise ValueError(f"found {frame.shape[1]} columns, expected {1 + COUNTS + CATEGORIES}")
    found = np.empty(len(frame), RECORD)
    found["clicked"] = frame[0].astype(np.uint8)
    for column in range(COUNTS):
        counts = pd.to_numeric(frame[1 + column], errors="raise").fillna(0).to_numpy(np.float32)
        found["counts"][:, column] = np.log1p(np.maximum(counts, 0))
    for column in range(CATEGORIES):
        row, words = pd.factorize(frame[1 + COUNTS + column])
        found["ids"][:, column] = np.array([int(word or "0", 16) for word in words], np.uint32)[row]
    return found


def convert(texts: Sequence[Path], folder: Path, records_in_part: int = 1_000_000) -> list[Path]:
    """Writes parts into a new or empty folder, and gives their paths, in order."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds files; expected an empty folder. Name another one, or empty it.")
    written: list[Path] = []
    held: list[np.ndarray] = []
    for found in records(texts):
        held.append(found)
        while sum(map(len, held)) >= records_in_part:
            joined = np.concatenate(held)
            written.append(_write(folder, len(written), joined[:records_in_part]))
            held = [joined[records_in_part:]]
    if sum(map(len, held)):
        written.append(_write(folder, len(written), np.concatenate(held)))
    return written


def _write(folder: Path, number: int, part: np.ndarray) -> Path:
    path = folder / f"part-{number:05d}.npy"
    np.save(path, part)
    return path


# ------------------------------------------------------------------------------------- from parts to batches


def parts_of(folder: Path) -> list[Path]:
    """The parts in a folder, in order."""
    found = sorted(folder.glob("part-*.npy"))
    if not found:
        raise FileNotFoundError(f"{folder} holds no part-*.npy; expected what `python examples/criteo.py` writes.")
    return found


def batch_of(found: np.ndarray) -> Batch:
    """`counts` (n, 13) float32, `ids` (n, 26) int64 and `clicked` (n,) float32 of n records."""
    return (
        torch.from_numpy(found["counts"].copy()),
        torch.from_numpy(found["ids"].astype(np.int64)),
        torch.from_numpy(found["clicked"].astype(np.float32)),
    )


class OwnParts(IterableDataset):
    """Batches of one trainer, read one after another from the parts that are its own: `parts[rank::trainers]`.

    Joined in the order of trainers, their n-th batches are the n-th global batch, of `batch` records; trainer k has part
    k of `torch.tensor_split`. All have as many batches: who has no records left gets some that are smaller, or empty.
    Only the sizes of others' parts are read.
    """

    def __init__(self, parts: Sequence[Path], batch: int, trainers: int = 1, rank: int = 0):
        if len(parts) < trainers:
            raise ValueError(f"found {len(parts)} parts for {trainers} trainers; expected at least one for each")
        self._own = parts[rank::trainers]
        shares = [len(share) for share in np.array_split(np.arange(batch), trainers)]
        if not min(shares):
            raise ValueError(f"found batches of {batch} for {trainers} trainers; expected at least one record for each")
        counts = [sum(len(_mapped(path)) for path in parts[k::trainers]) for k in range(trainers)]
        self._share = shares[rank]
        self._batches = max(-(-count // share) for count, share in zip(counts, shares, strict=True))

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        given = 0
        for found in _cut(map(_mapped, self._own), self._share):
            yield batch_of(found)
            given += 1
        for _ in range(self._batches - given):
            yield batch_of(np.empty(0, RECORD))


class AllParts(IterableDataset):
    """What `trainers` trainers read in each step, joined: for training that one device is to do in the same order."""

    def __init__(self, parts: Sequence[Path], batch: int, trainers: int = 1):
        self._readers = [OwnParts(parts, batch, trainers, rank) for rank in range(trainers)]

    def __len__(self) -> int:
        return len(self._readers[0])

    def __iter__(self) -> Iterator[Batch]:
        for batches in zip(*self._readers, strict=True):
            counts, ids, clicked = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
            yield counts, ids, clicked


def _mapped(path: Path) -> np.ndarray:
    found = np.load(path, mmap_mode="r")
    if found.dtype != RECORD:
        raise ValueError(f"{path}: found an array of {found.dtype}, expected records of a click log. Convert it again.")
    return found


def _cut(arrays: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Pieces of `size` records across the ends of arrays; the last may be smaller."""
    left = np.empty(0, RECORD)
    for array in arrays:
        start = 0
        if len(left):
            start = size - len(left)
            left = np.concatenate([left, array[:start]])
            if len(left) < size:
                continue
            yield left
        stop = start + (len(array) - start) // size * size
        for at in range(start, stop, size):
            yield array[at : at + size]
        left = array[stop:]
    if len(left):
        yield left


def main() -> None:
    options = argparse.ArgumentParser(description="Criteo's text format into parts that are read fast.")
    options.add_argument("texts", type=Path, nargs="+", help="text files, also .gz")
    options.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="an empty folder, or a new one")
    options.add_argument("--records", type=int, default=1_000_000, help="in a part")
    args = options.parse_args()
    written = convert(args.texts, args.to, args.records)
    print(f"{sum(len(_mapped(path)) for path in written):,} records in {len(written)} parts in {args.to}")


if __name__ == "__main__":
    main()
