# SPDX-License-Identifier: Apache-2.0
"""A real SLURM cluster of two machines on this one, as far as tests use it. `shared/tools/slurm_cluster.sh` beside the project makes it."""

import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT.parent / "shared" / "tools" / "slurm_cluster.sh"
# sbatch carries the caller's environment into the job: nothing of pytest's own ranks or of another job may get there.
_FOREIGN = re.compile(
    r"(LOCAL_|GROUP_)?(RANK|WORLD_SIZE)|(CROSS|LOCAL)_SIZE|MASTER_.*|CUDA_VISIBLE_DEVICES|(SLURM|WANDB|OMPI|PMI|PYTEST)_.*"
    r"|METHOD|CONFIGS?|MODEL|DATA|ARGS|OUTPUT(_ROOT)?|RANKS|SEEDS|LAUNCHER|MAX_RESTARTS"
)

_UNDER_WAY = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "NODE_FAIL", "PREEMPTED")
_ENDED_BADLY = ("FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY")


def why_not() -> str | None:
    """The reason for which there can be no cluster here."""
    if not TOOL.is_file():
        return f"needs {TOOL.name} beside the project"
    if os.geteuid() != 0:
        return "needs root, for the namespaces of the cluster's machines"
    if subprocess.run(
        ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "true"], capture_output=True
    ).returncode:
        return "needs the right to make namespaces (unshare)"
    return None


class Cluster:
    """Machines ctl, n1 and n2, with their files in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {name: value for name, value in os.environ.items() if not _FOREIGN.fullmatch(name)}
        lab = {"SLURM_LAB": str(folder / "lab"), "SLURM_LAB_PACKAGES": "openmpi-bin", "SLURM_LAB_NET": "10.78.0"}
        self.environment |= {**lab, "HF_DATASETS_CACHE": str(folder / "datasets")}
        self.environment |= {"VENV": "none", "PYTHONWARNINGS": "ignore", "WANDB_MODE": "offline"}

    def start(self) -> None:
        try:
            self._tool("start", seconds=240)
        except AssertionError as error:
            if "apt-get failed" in str(error):
                pytest.skip(f"SLURM is not installed and cannot be: {error}")
            raise

    def stop(self) -> None:
        self._tool("stop", seconds=60)

    def kill(self, machine: str) -> None:
        """Cut its power."""
        self._tool("kill-node", machine)

    def boot(self, machine: str) -> None:
        self._tool("start-node", machine)

    def run(self, *command: str, **environment: str) -> str:
        """Run a command on the login machine; what it prints."""
        return self._tool("exec", *command, environment=environment)

    def submit(self, script: Path, name: str, *options: str, **environment: str) -> "Job":
        """sbatch, from the project's folder."""
        log = self.folder / f"{name}-%A-%a.log" if "--array" in " ".join(options) else self.folder / f"{name}.log"
        answer = self.run(
            "sbatch", "--parsable", f"--job-name={name}", f"--output={log}", *options, str(script), **environment
        )
        return Job(self, int(answer.split(";")[0]), log)

    def _tool(self, *arguments: str, seconds: float = 120, environment: Mapping[str, str] | None = None) -> str:
        done = subprocess.run(
            ["bash", str(TOOL), *arguments],
            cwd=ROOT, env={**self.environment, **(environment or {})}, timeout=seconds, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, f"{' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()


class Job:
    """A job of the cluster."""

    def __init__(self, cluster: Cluster, number: int, log: Path) -> None:
        self.cluster, self.number, self._log = cluster, number, log

    @property
    def log(self) -> str:
        """What it has printed so far, over all its starts."""
        return self._log.read_text(errors="replace") if self._log.is_file() else ""

    @property
    def state(self) -> str:
        """SLURM's word; of an array's tasks that are not yet over if there are any, else of one that did not complete."""
        states = self._asked("JobState")
        return next(
            (state for states_of in (_UNDER_WAY, _ENDED_BADLY) for state in states if state in states_of), states[0]
        )

    @property
    def starts(self) -> int:
        return int(self._asked("Restarts")[0]) + 1

    def signal_script(self, name: str) -> None:
        """What `#SBATCH --signal=B:name@...` does when time is up."""
        self.cluster.run("scancel", "-b", "-s", name, str(self.number))

    def wait_until(self, reached: Callable[[], bool], what: str, seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < deadline, (
                f"job {self.number} is {self.state}, no {what} in {seconds:.0f} s:\n{self.log[-6000:]}"
            )
            assert self.state not in ("FAILED", "COMPLETED", "CANCELLED", "TIMEOUT"), (
                f"{self.state}, no {what}:\n{self.log[-6000:]}"
            )
            time.sleep(0.1)

    def wait(self, seconds: float = 120, state: str = "COMPLETED") -> None:
        """Until it is over; it must end in that state."""
        deadline = time.monotonic() + seconds
        while self.state in _UNDER_WAY:
            assert time.monotonic() < deadline, (
                f"job {self.number} is {self.state} after {seconds:.0f} s:\n{self.log[-6000:]}"
            )
            time.sleep(0.2)
        assert self.state == state, self.log[-6000:]

    def _asked(self, field: str) -> list[str]:
        found = re.findall(rf"\b{field}=(\S+)", self.cluster.run("scontrol", "show", "job", "-o", str(self.number)))
        assert found, f"job {self.number}: SLURM does not tell {field}"
        return found
