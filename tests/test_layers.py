"""The architecture's picture stays true: who may import whom."""

from __future__ import annotations

from pathlib import Path

from importlinter.cli import lint_imports


def test_no_layer_imports_what_it_must_not_know(capsys):
    status = lint_imports(config_filename=str(Path(__file__).parent.parent / "pyproject.toml"), no_cache=True)
    assert status == 0, capsys.readouterr().out
