"""The architecture's picture stays true: who may import whom."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CALL = "from importlinter.cli import lint_imports_command; lint_imports_command()"


def test_no_layer_imports_what_it_must_not_know():
    root = Path(__file__).parent.parent
    found = subprocess.run(
        [sys.executable, "-c", CALL, "--no-cache"], cwd=root, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "0 broken" in found.stdout
