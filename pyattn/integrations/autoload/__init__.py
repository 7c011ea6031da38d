"""What ``import torch`` runs at its end, where pyattn is installed: it puts pyattn to work if the environment says so.

    PYATTN_INSTALL=1         pyattn.install()
    PYATTN_TRANSFORMERS=1    pyattn.integrations.transformers.register(), once transformers has been imported

This package is named ``pyattn_autoload`` when it is installed (see setup.py) and imports nothing of pyattn until it
must: every program that imports torch runs it. It never raises, for torch's import would fail.
"""

import os
import sys
import traceback


def autoload() -> None:
    if os.environ.get("PYATTN_INSTALL") != "1" and os.environ.get("PYATTN_TRANSFORMERS") != "1":
        return
    if "pyattn" in sys.modules:  # which is importing torch, and obeys the environment at its own end
        return
    try:
        import pyattn  # noqa: F401
    except Exception:
        print("pyattn: PYATTN_INSTALL or PYATTN_TRANSFORMERS is set, but pyattn failed:", file=sys.stderr)
        traceback.print_exc()
