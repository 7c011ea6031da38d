"""How results are kept: an environment, and cells, one a line so that a diff shows which of them moved."""

import json
from pathlib import Path
from typing import Any


def save(path: Path, environment: dict[str, Any], cells: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(cell) for cell in cells)
    path.write_text(f'{{"environment": {json.dumps(environment, indent=1)},\n"cells": [\n{lines}\n]}}\n')
