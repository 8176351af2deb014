"""A click log that nobody has recorded, in Criteo's text format: for machines without the real one.

    python examples/invented_clicks.py out/invented.txt --lines 200000

Categories have as many values as those of the real log, used by a power law: few of them often, most of them hardly ever.
What is clicked is drawn from a hidden model that has a weight for each value, one for each of the 13 counts, and products
of pairs of values: what can be learnt puts the area under the ROC curve well above 0.5, and noise keeps it well
below 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from criteo import CARDINALITIES, CATEGORIES, COUNTS

POWER = 1.1
PAIRS = ((0, 9), (2, 5), (8, 13), (10, 19), (16, 25))
UNKNOWN_COUNTS = np.linspace(0.0, 0.4, COUNTS)
UNKNOWN_IDS = np.where(np.arange(CATEGORIES) % 5 == 4, 0.1, 0.0)
CLICK_RATE_OFFSET = -1.9
_AT_ONCE = 20_000


def ranks(generator: np.random.Generator, lines: int) -> np.ndarray:
    """(lines, 26) int64: 0 is a category's commonest value; the n-th comes about n ** -POWER as often."""
    drawn = generator.random((lines, CATEGORIES))
    ends = np.asarray(CARDINALITIES, np.float64) + 1
    power = 1 - POWER
    return np.floor((1 - drawn * (1 - ends**power)) ** (1 / power)).astype(np.int64) - 1


def mixed(numbers: np.ndarray, seed: int) -> np.ndarray:
    """uint64: numbers that look random, the same for the same number and seed (the last part of splitmix64)."""
    z = numbers.astype(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def weights(values: np.ndarray, seed: int) -> np.ndarray:
    """A weight for each value, between -1 and 1."""
    return mixed(values, seed).astype(np.float64) / 2**63 - 1


def clicks(generator: np.random.Generator, values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(n,) bool: drawn from the hidden model, of `values` (n, 26) and `counts` (n, 13)."""
    strengths = 0.3 + 0.9 * (np.arange(CATEGORIES) % 4 == 0)
    score = CLICK_RATE_OFFSET + (weights(values, 1) * strengths).sum(1)
    score += ((np.log1p(np.maximum(counts, 0)) - 2) * np.linspace(-0.15, 0.15, COUNTS)).sum(1)
    for one, other in PAIRS:
        score += 1.5 * weights(values[:, one], 2) * weights(values[:, other], 3)
    return generator.random(len(score)) < 1 / (1 + np.exp(-score))


def lines(count: int, seed: int) -> Iterator[str]:
    """`count` lines of text."""
    for start in range(0, count, _AT_ONCE):
        yield from _lines(np.random.default_rng((seed, start)), min(_AT_ONCE, count - start))


def _lines(generator: np.random.Generator, count: int) -> Iterator[str]:
    values = ranks(generator, count) + (np.arange(CATEGORIES) << 40)
    spread = np.linspace(0.8, 1.6, COUNTS)
    counts = np.floor(np.exp(generator.normal(2.0, spread, (count, COUNTS)))).astype(np.int64) - 1
    clicked = clicks(generator, values, counts)
    columns = [clicked.astype(np.int64).astype(str)]
    for column, share in enumerate(UNKNOWN_COUNTS):
        words = counts[:, column].astype(str)
        columns.append(np.where(generator.random(count) < share, "", words))
    for column, share in enumerate(UNKNOWN_IDS):
        distinct, row = np.unique(values[:, column], return_inverse=True)
        words = np.array([f"{number >> 32:08x}" for number in mixed(distinct, 0).tolist()])[row]
        columns.append(np.where(generator.random(count) < share, "", words))
    return ("\t".join(line) + "\n" for line in zip(*(column.tolist() for column in columns), strict=True))


def write(path: Path, count: int, seed: int = 0) -> None:
    """A file of `count` lines; the same for the same seed."""
    with path.open("w", encoding="ascii") as file:
        file.writelines(lines(count, seed))


def main() -> None:
    options = argparse.ArgumentParser(description="An invented click log in Criteo's text format.")
    options.add_argument("path", type=Path)
    options.add_argument("--lines", type=int, default=200_000)
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    write(args.path, args.lines, args.seed)


if __name__ == "__main__":
    main()
