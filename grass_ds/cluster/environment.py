# SPDX-License-Identifier: Apache-2.0
"""The variables that launchers set, read with errors that show them."""

import re
from collections.abc import Mapping

_SHOWN = re.compile(
    r"(LOCAL_|GROUP_)?(RANK|WORLD_SIZE)|(CROSS|LOCAL)_SIZE|MASTER_(ADDR|PORT)"
    r"|(OMPI|MV2)_COMM_WORLD_(LOCAL_)?(RANK|SIZE)|PMI_(RANK|SIZE)"
    r"|SLURM_(JOB_ID|STEP_ID|PROCID|LOCALID|NTASKS|NODEID|STEP_NUM_TASKS|STEP_NODELIST|STEP_TASKS_PER_NODE)"
)


class PlacementError(ValueError):
    """The variables of the launchers are incomplete, or contradict each other. The message shows them."""


class Environment:
    """Reads variables; :class:`PlacementError` if one is missing or no number. An empty one counts as not set."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    def has(self, name: str) -> bool:
        return self._environ.get(name, "") != ""

    def text(self, *names: str, default: str | None = None) -> str:
        """The first of the variables that is set."""
        value = next((self._environ[name] for name in names if self.has(name)), default)
        if value is None:
            launchers = "torchrun, deepspeed, accelerate launch, srun or mpirun"
            raise self.error(f"{names[0]} is not set; start with {launchers}, which set it")
        return value

    def integer(self, *names: str, default: int | None = None) -> int:
        """:meth:`text` as a number that is at least 0."""
        text = self.text(*names, default=None if default is None else str(default))
        if not text.isdecimal():
            name = next(name for name in names if self.has(name))
            raise self.error(f"{name}={text!r} must be a whole number, at least 0")
        return int(text)

    def integer_or_none(self, *names: str) -> int | None:
        """:meth:`integer`; None if none of them is set."""
        return self.integer(*names) if any(map(self.has, names)) else None

    def error(self, message: str) -> PlacementError:
        """An error that shows all variables of launchers."""
        shown = [f"{name}={value}" for name, value in sorted(self._environ.items()) if _SHOWN.fullmatch(name)]
        return PlacementError(f"{message}. Seen: {' '.join(shown) or 'no variable of any launcher'}")
