"""python -m pyattn.models.data"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence

from pyattn.models.data.sets import SETS, fetch, folder


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pyattn.models.data", description=f"Fetch data into {folder()}.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default all: {', '.join(SETS)}")
    names = parser.parse_args(argv).names or SETS
    try:
        fetch(names, progress=functools.partial(print, flush=True))
    except (OSError, RuntimeError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
