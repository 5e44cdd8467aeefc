# SPDX-License-Identifier: Apache-2.0
"""``python -m grass_ds run``: a program finds what plain Python gives it, and its DeepSpeed config samples layers."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers.models import LAYERS
from helpers.programs import torchrun
from helpers.ranks import free_port

ROOT = Path(__file__).resolve().parents[2]
RUN = ("-m", "grass_ds", "run")
PACKAGED = "package.part"  # a module that is run by -m, also as package/part.py

SEEN = """
    import json, os, pickle, signal, sys
    import __main__

    class Local: ...

    def end():
        match sys.argv[-1]:
            case "exit": sys.exit(3)
            case "message": sys.exit("said at the end")
            case "error": raise KeyError("of the program")
            case "SIGTERM" | "SIGINT" as name: os.kill(os.getpid(), signal.Signals[name]); signal.pause()
            case "handler":
                signal.signal(signal.SIGUSR1, lambda *_: sys.exit(5))
                os.kill(os.getpid(), signal.SIGUSR1)

    names = {name: str(getattr(__main__, name)) for name in ("__name__", "__file__", "__package__", "__cached__", "__doc__")}
    spec = getattr(__main__.__spec__, "name", None)
    same = globals() is vars(__main__) and type(pickle.loads(pickle.dumps(Local()))) is Local
    seen = [sys.argv, sys.path[0], sys.path.count(sys.path[0]), names, spec, type(__loader__).__name__, same]
    print("seen", json.dumps(seen), flush=True)
    end()
"""

# As the DeepSpeed tutorials have it: nothing in it knows of grass_ds.
TRAINING = """
    import argparse, json, sys
    import deepspeed, torch
    from helpers.models import batch, snapshot, tiny_llama

    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("output")
    deepspeed.add_config_arguments(parser)
    arguments = parser.parse_args()
    model = tiny_llama()
    before = snapshot(model)
    engine, *_ = deepspeed.initialize(args=arguments, model=model, model_parameters=model.parameters())
    for step in range(2):
        ids = batch(step, 0, engine.global_rank)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    moved = [name for name, weight in snapshot(model).items() if not torch.equal(weight, before[name])]
    with open(f"{arguments.output}.{engine.global_rank}", "w") as file:
        json.dump({"moved": moved, "world": engine.world_size, "given": [a for a in sys.argv if "rank" in a]}, file)
    deepspeed.comm.destroy_process_group()
"""
DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "grass": {"sampler": "cyclic", "cyclic_order": "ascending", "num_active_layers": 1, "sample_period": 1},
}


def written(path: Path, source: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(line.removeprefix("    ") for line in source.splitlines()))
    return path


def python(arguments: Sequence[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("program", "end"),
    [
        (("programs/seen.py",), "exit"),
        (("link.py",), "error"),
        (("-m", PACKAGED), "message"),
        (("-m", "package"), "handler"),
        (("programs/seen.py",), "SIGTERM"),
        (("programs/seen.py",), "SIGINT"),
    ],
)
def test_a_program_finds_what_python_gives_it(tmp_path: Path, program: tuple[str, ...], end: str) -> None:
    for name in ("programs/seen.py", "package/part.py", "package/__main__.py"):
        written(tmp_path / name, SEEN)
    (tmp_path / "link.py").symlink_to("programs/seen.py")
    arguments = [*program, "-m", "--help", "--", "--deepspeed=a b", "-h", "--local_rank", "7", end]
    plain, ours = (python([*way, *arguments], tmp_path, PYTHONDONTWRITEBYTECODE="1") for way in ((), RUN))
    expected = {"exit": 3, "error": 1, "message": 1, "handler": 5}.get(end)
    assert plain.returncode == (-signal.Signals[end] if expected is None else expected)
    assert ours.returncode == plain.returncode
    seen = [[line for line in done.stdout.splitlines() if line.startswith("seen")] for done in (plain, ours)]
    assert len(seen[0]) == 1 and seen[0] == seen[1]
    if end != "SIGTERM":
        last = plain.stderr.splitlines()[-1:]
        assert ours.stderr.splitlines()[-1:] == last
        assert last or end in ("exit", "handler")
    assert ("Traceback" in ours.stderr) == (end in ("error", "SIGINT"))


def test_safe_paths_stay_safe(tmp_path: Path) -> None:
    """With PYTHONSAFEPATH Python puts no folder in front; it exists from Python 3.11 on."""
    script = written(tmp_path / "programs/path.py", "    import sys; print('seen', sys.path[0])")
    plain, ours = (python([*way, str(script)], tmp_path, PYTHONSAFEPATH="1") for way in ((), RUN))
    assert [line for line in ours.stdout.splitlines() if line.startswith("seen")] == plain.stdout.splitlines()
    assert (str(script.parent) in plain.stdout) == (sys.version_info < (3, 11))


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "name a script, or a module behind -m"),
        (["-m"], 2, "name a script, or a module behind -m"),
        (["nothing.py"], 2, "error: there is no file 'nothing.py' to run"),
        (["-m", "nothing.of.it"], 1, "No module named 'nothing"),
    ],
)
def test_a_program_that_is_not_there(tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    done = python([*RUN, *arguments], tmp_path)
    assert done.returncode == code
    assert said in done.stderr


@pytest.mark.dist
def test_an_unchanged_script_is_sampled_by_its_config(tmp_path: Path) -> None:
    """Layers 0 and 1 are active in the two steps. The stock engine, which ignores the block, trains all of them."""
    script = str(written(tmp_path / "training.py", TRAINING))
    (tmp_path / "ds.json").write_text(json.dumps(DS_CONFIG))
    options = ["--deepspeed_config", "ds.json"]
    deepspeed = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
    launchers = {
        "deepspeed": [*deepspeed, "--module", "grass_ds", "run", script],
        "torchrun": [*torchrun(2)[1:], "-m", "grass_ds", "run", script],
        "stock": [*torchrun(2)[1:], script],
    }
    for name, command in launchers.items():
        done = python([*command, name, *options], tmp_path, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stdout + done.stderr
        active = range(LAYERS) if name == "stock" else (0, 1)
        for rank in range(2):
            found = json.loads((tmp_path / f"{name}.{rank}").read_text())
            layers = {int(parts[2]) for parts in (n.split(".") for n in found["moved"]) if parts[1] == "layers"}
            assert layers == set(active), name
            assert ("model.embed_tokens.weight" in found["moved"]) == (name == "stock")
            assert (found["world"], found["given"]) == (2, [f"--local_rank={rank}"] if name == "deepspeed" else [])
