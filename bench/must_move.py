"""How many bytes a training step must move between processes, whatever moves them. Pure."""

from __future__ import annotations

from collections.abc import Sequence

ID_NBYTES = 8


def bytes_per_step(unique_rows: Sequence[Sequence[int]], row_nbytes: int, dense_nbytes: int) -> float:
    """Bytes of one step of all trainers, mean over their batches.

    Every trainer gets the rows that its batch touches and gives their gradients, and says once which rows they are;
    of everything dense it gives the gradient and gets what comes of it.

        one trainer, 10 rows of 128 bytes, 1000 bytes dense: 10 * (2 * 128 + 8) + 2 * 1000 = 4640

    unique_rows: of each trainer, for each of its batches.
    """
    per_trainer = [sum(rows) / len(rows) * (2 * row_nbytes + ID_NBYTES) + 2 * dense_nbytes for rows in unique_rows]
    return sum(per_trainer)
