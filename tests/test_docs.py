"""The snippets of docs/integrations.md run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

TEXT = (Path(__file__).parent.parent / "docs" / "integrations.md").read_text()
SNIPPETS = dict(re.findall(r"^## ([\w-]+).*?^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL))


def test_every_client_has_one():
    assert list(SNIPPETS) == ["Everything", "transformers", "flash-attn", "diffusers", "xformers"]


@pytest.mark.parametrize("client", SNIPPETS)
def test_snippet(client, tmp_path):
    done = subprocess.run([sys.executable, "-c", SNIPPETS[client]], capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
