# SPDX-License-Identifier: Apache-2.0
"""launch/torchrun.py: signals reach the ranks though only it gets them, and the exit code is theirs."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.ranks import free_port
from helpers.tiered import tiered

ROOT = Path(__file__).resolve().parents[2]

# A rank that ends as ours do: with 75 when asked to, with 76 when told that another is lost.
RANK = """
import os, signal, sys, time
from pathlib import Path
folder, rank = Path(sys.argv[1]), os.environ["RANK"]
def note(number, frame):
    (folder / f"{rank}.{signal.Signals(number).name}").touch()
signal.signal(signal.SIGUSR1, note)
signal.signal(signal.SIGTERM, note)
(folder / f"{rank}.ready").touch()
end = time.monotonic() + 60
while not (folder / f"{rank}.SIGTERM").exists() and time.monotonic() < end:
    time.sleep(0.05)
sys.exit(int(sys.argv[2]))
"""


@pytest.mark.dist
@pytest.mark.parametrize("code", tiered([75, 0], 75))
def test_signals_are_handed_on_and_exit_codes_come_through(tmp_path: Path, code: int) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    command = [sys.executable, "launch/torchrun.py", "--nproc-per-node=2", f"--master-port={free_port()}"]
    agent = subprocess.Popen([*command, str(script), str(tmp_path), str(code)], cwd=ROOT, stderr=subprocess.PIPE)
    try:
        wait_for(tmp_path, "ready")
        agent.send_signal(signal.SIGUSR1)
        wait_for(tmp_path, "SIGUSR1")
        assert agent.poll() is None
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(30) == code
    finally:
        agent.kill()


def wait_for(folder: Path, what: str) -> None:
    deadline = time.monotonic() + 60
    while len(list(folder.glob(f"*.{what}"))) < 2:
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
