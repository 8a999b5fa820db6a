"""The paper's claims, measured here: one JSON file a part, and a page made from them.

    python benchmarks/claims.py [--part NAME ...] [--seeds N] [--quick] [--jobs N] [--out docs/evidence] [--json FILE]

Every measurement is written down as soon as it is done, and not repeated: stop and start again as you like. To measure
something anew, take it out of OUT/PART.json. The page is OUT.md, its pictures are in OUT. OUT/PART.txt may hold remarks
on the figures, for the page. `--page-only` measures nothing.

Exit status 1 if something could not be measured; each is named.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from evidence.cells import REPOSITORY, Options, read_part, run_part
from evidence.page import write_page
from evidence.parts import PARTS

from re2tal.strict_json import write_json


def main() -> None:
    """Measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=list(PARTS), help="only these; may be repeated")
    parser.add_argument("--seeds", type=int, default=3, help="of everything that is trained")
    parser.add_argument("--quick", action="store_true", help="short trainings of fewer forms, small videos")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side, one thread each; 2 on two cores")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "evidence")
    parser.add_argument("--data", type=Path, default=Path("claims_data"), help="shards of demo and URFD; built there")
    parser.add_argument("--shared", type=Path, default=Path("claims_data"), help="folder with urfd and weights")
    parser.add_argument("--page-only", action="store_true", help="write the page from what was measured before")
    parser.add_argument("--json", type=Path, help="all parts in one file")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f"--seeds is {arguments.seeds}; give at least 1")
    if arguments.jobs < 1:
        parser.error(f"--jobs is {arguments.jobs}; give at least 1")
    if arguments.jobs > 1:  # of the processes that train; else each takes all cores
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    options = Options(arguments.seeds, arguments.quick, arguments.data, arguments.shared, arguments.jobs)
    failed: list[str] = []
    for name in [] if arguments.page_only else [name for name in PARTS if name in (arguments.part or PARTS)]:
        failed += run_part(name, PARTS[name], options, arguments.out)
        write_page(arguments.out, PARTS)
    write_page(arguments.out, PARTS)
    if arguments.json:
        write_json(arguments.json, {name: read_part(arguments.out / f"{name}.json") for name in PARTS})
    for line in failed:
        print(f"not measured: {line}", file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
