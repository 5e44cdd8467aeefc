# SPDX-License-Identifier: Apache-2.0
"""The README: its Python blocks run, its commands name files that exist, its numbers are those of the benchmark rows."""

import importlib.util
import itertools
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def run_block(code: str, folder: str) -> dict[str, Any]:
    """Execute one block with what its text promises: ``model``, ``batches`` and ``dataset``."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from helpers.models import batch, snapshot, tiny_llama

    import grass_ds

    model = tiny_llama()
    before = snapshot(model)
    rank = deepspeed.comm.get_rank()
    if get_accelerator().device_name() == "cpu":  # the Trainer refuses bf16 without a GPU unless told so
        code = code.replace("bf16=True", "bf16=True, use_cpu=True")
    # The ranks of the pool go on.
    code = code.replace("deepspeed.comm.destroy_process_group()", "").replace("sys.exit(", "status = (")
    rows = [{"input_ids": ids, "labels": ids} for ids in (batch(0, i, 0, size=1)[0] for i in range(200))]
    batches = [{"input_ids": ids, "labels": ids} for ids in (batch(i, 0, rank) for i in range(5))]
    names: dict[str, Any] = {"model": model, "dataset": rows, "batches": batches}
    os.chdir(folder)
    stock = deepspeed.initialize
    try:
        exec(compile(code, "README.md", "exec"), names)
    finally:
        deepspeed.initialize = stock
        os.chdir(ROOT)
    engine = names["engine"] if "engine" in names else names["trainer"].deepspeed
    assert isinstance(engine, grass_ds.GrassEngine)
    assert names.get("status", 0) == 0
    moved = sorted(
        n for n, p in model.named_parameters() if not (p.float().cpu() == before[n].to(p.dtype).float()).all()
    )
    visits = engine.grass.visits
    engine.destroy()
    if "preemption" in names:
        names["preemption"].close()
    return {"moved": moved, "visits": visits}


@pytest.mark.dist
@pytest.mark.parametrize("index", range(3))
def test_python_blocks_run(two_ranks: Any, tmp_path: Path, index: int) -> None:
    code = blocks("python")
    assert len(code) == 3
    code[2] = code[0] + code[2]  # "in your own loop", with the engine of the first
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    for result in two_ranks.run(run_block, code=code[index], folder=str(tmp_path), timeout=180):
        assert sum(result["visits"]) > 0
        trained = {f"model.layers.{i}." for i, visits in enumerate(result["visits"]) if visits}
        assert result["moved"]
        assert all(name == "model.norm.weight" or name.startswith(tuple(trained)) for name in result["moved"])
    if index == 1:
        assert (tmp_path / "out" / "model.safetensors").exists()
        assert list((tmp_path / "out" / "plots").glob("*.png"))


def test_shell_blocks_name_what_exists() -> None:
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    assert len(commands) >= 4
    for command in commands:
        words = shlex.split(command, comments=True)
        files = [word for word in words if re.fullmatch(r"(launch|tests|ds_configs|benchmarks|slurm)/\S+", word)]
        modules = [module for flag, module in itertools.pairwise(words) if flag == "-m"]
        assert files or modules, command
        assert all((ROOT / file).is_file() for file in files), command
        assert all(importlib.util.find_spec(module) for module in modules), command


def test_tables_match_the_benchmark_rows() -> None:
    from benchmarks import render

    assert render.README.read_text() == render.readme()
    assert render.RESULTS.read_text() == render.results()


@pytest.mark.parametrize("name", ["GrassConfig", "OffloadConfig"])
def test_every_setting_is_listed_with_its_default(name: str) -> None:
    from grass_ds import config

    fields = {key: field for key, field in getattr(config, name).model_fields.items() if key != "offload"}
    for key, field in fields.items():
        rows = re.findall(rf"^\| `{key}` \| (.+?)(?: \*)? \|", README, flags=re.MULTILINE)
        default = field.default if field.default is not None else "null"
        wanted = json.dumps(default) if default != "null" else "null"
        assert any(json.loads(row.strip("`")) == json.loads(wanted) for row in rows), (key, wanted, rows)
