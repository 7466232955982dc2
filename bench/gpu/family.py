"""Measures the rows of one family in a process of its own: `python bench/gpu/family.py FAMILY FILE [--quick]`.

Every row is a line of JSON in FILE as soon as it is there, so that a process that dies or runs out of time leaves what
it had. A row that raises is one with a reason, and the rest goes on.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import torch
from clock import Bench
from targets import FAMILIES, Missing, Result, functions


def main(family: str, file: Path, quick: bool) -> None:
    torch.manual_seed(0)
    bench = Bench("cuda" if torch.cuda.is_available() else "cpu", quick)
    with file.open("a") as out:

        def keep(row: Result | Missing) -> None:
            out.write(json.dumps(row.as_dict()) + "\n")
            out.flush()

        for function, targets in functions(family):
            left = {target.key for target in targets}
            try:
                for row in function(bench):
                    left.remove(row.key)
                    keep(row)
            except Exception as error:
                traceback.print_exc()
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                for key in sorted(left):
                    keep(Missing(key, reason))
            gc.collect()
            if bench.on_gpu:
                torch.cuda.empty_cache()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("file", type=Path)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    main(given.family, given.file, given.quick)
