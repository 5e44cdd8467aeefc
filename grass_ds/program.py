# SPDX-License-Identifier: Apache-2.0
"""``python -m grass_ds run``: an unchanged training program, with :func:`grass_ds.enable` called before it starts."""

import io
import os
import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from types import ModuleType

from grass_ds.entry import enable


def run_program(arguments: Sequence[str], module: bool = False) -> None:
    """Run a program in this process, as ``python FILE ARGS...`` or ``python -m MODULE ARGS...`` would.

    ``sys.argv``, ``sys.path[0]`` and ``__main__`` are as Python itself would set them, and stay so. What the program
    raises, ``SystemExit`` included, is raised here; signals reach its handlers.

    Args:
        arguments: the program, and what it finds in ``sys.argv[1:]``.
        module: the program is the name of a module or package instead of a file.
    """
    program = arguments[0]
    sys.argv[:] = arguments
    enable()
    if module:
        _set_first_path(os.getcwd())
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        _set_first_path(os.path.dirname(os.path.realpath(program)))
        _run_file(os.path.abspath(program))


def _run_file(path: str) -> None:
    """As Python: ``__file__`` is absolute, ``sys.argv[0]`` as it was typed. ``runpy.run_path`` makes them equal."""
    with io.open_code(path) as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    main = ModuleType("__main__")
    vars(main).update(__file__=path, __cached__=None, __loader__=SourceFileLoader("__main__", path))
    main.__dict__["__builtins__"] = sys.modules["builtins"]
    sys.modules["__main__"] = main
    exec(code, vars(main))


def _set_first_path(folder: str) -> None:
    """Unless Python was told (``-P``, ``-I``, PYTHONSAFEPATH) to put no folder of the program into ``sys.path``."""
    if not (getattr(sys.flags, "safe_path", False) or sys.flags.isolated):
        sys.path[0] = folder
