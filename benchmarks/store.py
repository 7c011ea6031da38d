"""How results are kept: an environment, and cells, one a line so that a diff shows which of them moved."""

import datetime
import json
import re
from pathlib import Path
from typing import Any

from pyattn import compare


def environment(command: str) -> dict[str, Any]:
    """Of what a command measures on a CPU; ``device`` is the folder of its results."""
    found = compare.environment() | {"command": command}
    del found["threads"]  # each cell has its own
    found["device"] = re.sub(r"\W+", "-", f"{found['cpu']} {found['cores']}c".lower())
    found["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return found


def save(path: Path, environment: dict[str, Any], cells: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(cell) for cell in cells)
    path.write_text(f'{{"environment": {json.dumps(environment, indent=1)},\n"cells": [\n{lines}\n]}}\n')
