"""The examples' models with tables on servers against one device, widely: `make equality`.

Nine categories of each model, every optimizer, in every setting below, or in those that are named; some minutes each.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from syncwright import ParameterServer
from syncwright.plan import Blocks
from tests.distributed.example_job import Setting
from tests.distributed.example_references import differences, start

CATEGORIES = 9
SETTINGS = {
    "2 trainers": Setting(2),
    "3 trainers": Setting(3, dense=ParameterServer(), own=False),
    "1 trainer": Setting(1),
    "2 trainers, 1 server": Setting(2, 1, own=False),
    "2 trainers, 3 servers": Setting(2, 3, dense=ParameterServer()),
    "2 trainers, nothing asked for ahead": Setting(2, tables=ParameterServer(prefetch=False)),
    "2 trainers, tables in pieces": Setting(2, tables=ParameterServer(partition=Blocks(min_elements=64))),
    "3 trainers, all-reduce": Setting(3),
    "3 trainers, tables in pieces": Setting(
        3, 3, dense=ParameterServer(), tables=ParameterServer(partition=Blocks(min_elements=64))
    ),
}


def main(names: list[str]) -> int:
    """Runs every setting and prints what is wrong."""
    failed = 0
    for name in names:
        setting = SETTINGS[name]
        with tempfile.TemporaryDirectory() as folder:
            done = start(setting, Path(folder), CATEGORIES)
        found = differences(setting, done, CATEGORIES)
        print(
            f"{name}: {len(setting.variants)} variants, {len(found)} variables differ", *found, sep="\n  ", flush=True
        )
        failed += bool(found)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(SETTINGS)))
