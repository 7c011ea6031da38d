"""Programs that fetch and make sets."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

DEBIAN = "the sets are packages of Debian: `apt-get update`, as root, must have been run before"
HINTS = {
    "apt-get": DEBIAN,
    "dpkg-deb": DEBIAN,
    "espeak-ng": "`apt-get install espeak-ng`, as root, installs it",
}


def run(command: Sequence[str], where: Path | None = None) -> str:
    """What a program writes.

    Raises:
        RuntimeError: it is not there, or failed, with what it had to say.
    """
    hint = f" ({HINTS[command[0]]})" if command[0] in HINTS else ""
    try:
        done = subprocess.run(command, cwd=where, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise RuntimeError(f"{command[0]} is not there{hint}") from error
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed{hint}:\n{done.stderr.strip()}")
    return done.stdout
