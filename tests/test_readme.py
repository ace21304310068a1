"""The first steps of a new user: a built wheel in an empty environment, and the README's quickstart as it stands."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Server

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.timeout(900)  # installs torch into an environment of its own


def shell(script: str, environment: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a script with bash as a user would, with the environment activated."""
    variables = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("VIRTUAL_ENV", "PYTHON"))},
        "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",
        "PIP_CONSTRAINT": str(ROOT / "constraints.txt"),
        "PIP_NO_COMPILE": "0",  # the value of `compile`, whatever the name says: bytecode would take most of the time
        "COLUMNS": "200",
    }
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment in which nothing but the wheel is installed, without extras."""
    folder = tmp_path_factory.mktemp("new-user")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    done = shell(
        f"pip wheel --quiet --no-deps --wheel-dir dist {ROOT} && pip install dist/*.whl", folder / "venv", folder
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "venv"


def free_ports(count: int) -> list[str]:
    """Returns ports of 127.0.0.1 that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [str(listener.getsockname()[1]) for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


def test_a_data_owner_needs_no_extra(environment: Path, four_servers: list[Server], tmp_path: Path):
    """Training and prediction work with the client alone. Hosting and auditing name the extra that they need."""
    installed = shell("pip list --format=freeze", environment, tmp_path).stdout.lower()
    assert "blindtune==" in installed
    assert not [name for name in ("fastapi", "uvicorn", "gguf", "scikit-learn") if f"\n{name}" in installed]
    servers = " ".join(f"--server {server.url}" for server in four_servers[:2])
    rows = [f"pain for {day} days,heart\nitching for {day} days,skin" for day in range(1, 21)]
    (tmp_path / "notes.csv").write_text("\n".join(["note,diagnosis", *rows, ""]))
    done = shell(
        f"blindtune labels train {servers} --data notes.csv --text note --label diagnosis --output out "
        f"&& blindtune labels train --method padded-lora {servers} --data notes.csv --text note --label diagnosis "
        "--steps 3 --output padded "
        f"&& blindtune labels predict out {servers} --data notes.csv --text note --output predicted.csv "
        f"&& blindtune labels predict padded {servers} --data notes.csv --text note --output padded.csv",
        environment,
        tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len((tmp_path / "predicted.csv").read_text().splitlines()) == 41
    for command, extra in (
        ("blindtune serve --model minilm --no-auth", "server"),
        ("blindtune labels audit seen --labels notes.csv --text note --label diagnosis", "audit"),
    ):
        refused = shell(command, environment, tmp_path)
        assert refused.returncode == 1, refused.stdout
        assert f"blindtune[{extra}]" in refused.stderr


def test_the_quickstart_of_the_readme(environment: Path, tmp_path: Path):
    """Runs the block as it stands, apart from the ports, in a copy of the repository."""
    ignored = shutil.ignore_patterns(".*", "out", "_build", "__pycache__", "results")
    shutil.copytree(ROOT, tmp_path / "clone", ignore=ignored)
    readme = (ROOT / "README.md").read_text()
    script = re.search(r"## Quickstart.*?```bash\n(.*?)```", readme, re.DOTALL)
    assert script is not None
    commands = script[1]
    for port, free in zip(("8001", "8002"), free_ports(2), strict=True):
        commands = commands.replace(port, free)
    # job control, as in a terminal; and no server is left if a command fails
    done = shell(
        f"set -m\ntrap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n{commands}", environment, tmp_path / "clone"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The strongest attack without labels" in done.stdout
    assert len((tmp_path / "clone" / "predicted.csv").read_text().splitlines()) == 121
