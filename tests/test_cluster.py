"""The grid submitted as a job to a Ray cluster that was started by hand, as the README shows it."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ray_by_turns

from pipeline import ledger, paths

pytestmark = [pytest.mark.slow, ray_by_turns]
RAY = Path(sys.executable).parent / "ray"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A head on this machine with a token of its own; yields the address for jobs."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)
    dashboard, port, agent = free_port(), free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:  # socket paths must be short
        command = [str(RAY), "start", "--head", "--block", "--disable-usage-stats", "--num-cpus", "2"]
        command += ["--port", str(port), "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)]
        head = subprocess.Popen(
            [*command, "--dashboard-agent-listen-port", str(agent), "--temp-dir", folder],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_for(dashboard)
            yield f"http://127.0.0.1:{dashboard}"
        finally:
            head.send_signal(signal.SIGTERM)
            head.wait(timeout=60)


def wait_for(port: int, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    pytest.fail(f"no Ray dashboard on port {port} after {seconds:g} s")


def submit(address: str, entry: str) -> subprocess.CompletedProcess[str]:
    """Submits a job and follows it to its end; a head that has just started may not take jobs yet."""
    command = [str(RAY), "job", "submit", "--address", address, "--", "bash", "-c", entry]
    for _ in range(10):
        done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=300)
        if "No available agent" not in done.stdout + done.stderr:
            break
        time.sleep(2)
    return done


def test_submitted_grid_fills_the_ledger(data: Path, cluster: str) -> None:
    entry = f"cd {paths.CODE} && QRNN_ROOT={data} {sys.executable} -m pipeline tune --scale sample --task ptb"
    done = submit(cluster, entry)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ptb: 3 done" in done.stdout
    assert {record["model"] for record in ledger.records("sample")} == {"lstm", "qrnn", "qrnn-zoneout"}
