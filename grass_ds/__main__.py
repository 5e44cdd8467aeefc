# SPDX-License-Identifier: Apache-2.0
"""The command line ``python -m grass_ds``, or ``grass-ds``: ``run``, ``doctor``, ``plan``, ``compare``, ``expand``."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from grass_ds.doctor.run import run
from grass_ds.plan.request import add_arguments, request_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that ``arguments`` (default: those of the process) name; returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m grass_ds", description="Layer-sampled fine-tuning under DeepSpeed ZeRO."
    )
    # DeepSpeed's launcher puts it before all other arguments; LOCAL_RANK says the same.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command")
    program = commands.add_parser(
        "run",
        help='a training program, unchanged: the "grass" block of its DeepSpeed config takes effect',
        description="Runs SCRIPT, or with -m a module, as Python would, with grass_ds.enable() called first. It works "
        "under every launcher: deepspeed --module grass_ds run SCRIPT ..., torchrun -m grass_ds run SCRIPT ...",
        usage="python -m grass_ds run (SCRIPT | -m MODULE) [ARGS ...]",
    )
    program.add_argument("-m", dest="module", action="store_true", help=argparse.SUPPRESS)
    program.add_argument("program", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    doctor = commands.add_parser(
        "doctor",
        help="would training start on this machine, or under this launcher, and if not, why",
        description="Checks what training needs here, alone or under srun, torchrun, deepspeed, mpirun. Exit code 1: "
        "it would fail, or compute in an emulated precision.",
    )
    doctor.add_argument("--deepspeed", metavar="CONFIG", help="check that this device computes the config's precision")
    doctor.add_argument("--nvme_path", metavar="FOLDER", help='measure the folder meant for "grass.offload.nvme_path"')
    doctor.add_argument("--shared_path", metavar="FOLDER", help="check that all ranks see what rank 0 writes there")
    doctor.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    doctor.add_argument(
        "--plan",
        metavar="FILE",
        nargs="?",
        const="",
        help="does this machine have what a plan needs: the output of `plan --json`, or without FILE of these arguments:",
    )
    add_arguments(doctor, required=False)
    planning = commands.add_parser(
        "plan",
        help="what a run needs on device, host and disk, and what fits",
        description="Needs no weights, no GPU and, for a local config, no network. Exit code 1: it does not fit.",
    )
    add_arguments(planning)
    planning.add_argument("--nvme_path", metavar="FOLDER", help='for the config: "grass.offload.nvme_path"')
    planning.add_argument("--write", metavar="FILE", type=Path, help="write a DeepSpeed config that trains as planned")
    planning.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    comparison = commands.add_parser(
        "compare",
        help="finished runs side by side: results, loss curves, who trained when, settings that differ",
        description="Reads what launch/train.py, or a Trainer with GrassCallback, left in the folders of runs. "
        "What a run lacks stays empty.",
    )
    comparison.add_argument("runs", metavar="RUN", nargs="+", help="the --output_dir of a run")
    comparison.add_argument("--plot", metavar="FILE.png", help="draw the loss curves")
    comparison.add_argument("--html", metavar="FILE", help="write one page with everything, which needs no network")
    expansion = commands.add_parser(
        "expand",
        help="copy a checkpoint, with its optimizer states in fp32, for zero_to_fp32.py and ds_to_universal.py",
        description='Only checkpoints of another "grass.offload.state_format" than fp32 need it.',
    )
    expansion.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a folder <save_dir>/<tag>")
    expansion.add_argument("output", metavar="OUTPUT", type=Path, help="a folder to make")
    options = parser.parse_args(arguments)
    if options.command == "run":
        if not options.program:
            program.error("name a script, or a module behind -m")
        return _run(options)
    if options.command == "compare":
        return _print(_compare, options)
    if options.command == "expand":
        return _print(_expand, options)
    if options.command == "plan":
        return _plan(options)
    if options.command == "doctor":
        needs = None
        if options.plan is not None:
            try:
                needs = _needs(options)
            except (ValueError, OSError, ImportError) as error:
                return _failed(error)
        return run(options.deepspeed, options.nvme_path, options.shared_path, options.json, needs)
    parser.print_help()
    return 0


def _run(options: argparse.Namespace) -> int:
    from grass_ds.program import run_program  # it needs DeepSpeed, and the doctor must start without

    name, *rest = options.program
    if not options.module and not os.path.isfile(name):
        print(f"error: there is no file {name!r} to run", file=sys.stderr)
        return 2  # as Python
    # What DeepSpeed's launcher adds is meant for the program.
    added = [] if options.local_rank is None else [f"--local_rank={options.local_rank}"]
    run_program([name, *added, *rest], options.module)
    return 0


def _compare(options: argparse.Namespace) -> str:
    from grass_ds.compare.command import compare  # it needs numpy, and the doctor must start without

    return compare(options.runs, options.plot, options.html)


def _expand(options: argparse.Namespace) -> str:
    from grass_ds.checkpoint.expand import expand

    count = expand(options.checkpoint, options.output)
    return f"{options.output}: optimizer states of {count} ranks are fp32 now" if count else "nothing was compact"


def _plan(options: argparse.Namespace) -> int:
    from grass_ds.plan.report import report  # it loads torch and transformers

    try:
        text, fits = report(request_of(options, options.nvme_path), options.write, options.json)
    except (ValueError, OSError) as error:
        return _failed(error)
    print(text)
    return int(not fits)


def _needs(options: argparse.Namespace) -> dict[str, Any]:
    """What the plan of ``doctor --plan`` needs."""
    from grass_ds.plan.report import read_needs
    from grass_ds.plan.search import plan

    if options.plan:
        needs = read_needs(Path(options.plan))
        return needs if options.nvme_path is None else {**needs, "nvme_path": options.nvme_path}
    return plan(request_of(options, options.nvme_path)).needs


def _failed(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 1


def _print(command: Callable[[argparse.Namespace], str], options: argparse.Namespace) -> int:
    try:
        print(command(options))
    except (ValueError, OSError) as error:
        return _failed(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
