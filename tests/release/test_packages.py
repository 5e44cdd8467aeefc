# SPDX-License-Identifier: Apache-2.0
"""The wheel and the sdist: what is in them, and that each alone runs README's loop."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from helpers.markdown import code_blocks

import grass_ds

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = ("grass_ds", "pyproject.toml", "README.md", "LICENSE")

# What README says of the names in its block.
BEFORE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
model = LlamaForCausalLM(LlamaConfig(vocab_size=128, **shape))
ids = torch.arange(64).view(2, 32)
batches = [{"input_ids": ids, "labels": ids}] * 4
"""
AFTER = """
assert engine.grass.phase == "train" and sum(engine.grass.visits) == 4
print(grass_ds.__file__, grass_ds.__version__)
"""


def run(*command: str | Path, folder: Path) -> str:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def empty_environment(folder: Path) -> Path:
    """Its Python. It sees the packages of this environment, which would take GBs, but prefers its own."""
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder).strip()
    run(
        python, "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools", folder=folder
    )  # Python 3.11 brings an old one
    others = [path for path in sys.path if path.endswith("-packages")]
    Path(own, "others.pth").write_text("\n".join(others) + "\n")
    return python


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel and the sdist, as ``python -m build`` makes them of a copy of the sources."""
    pytest.importorskip("build", reason="pip install '.[release]'")
    sources, made = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, sources / name)
    # Without isolation it needs no network. The wheel is made of the sdist.
    paths = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(made), str(sources)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {"wheel": next(made.glob("*.whl")), "sdist": next(made.glob("*.tar.gz"))}


@pytest.mark.all
def test_they_hold_the_whole_library(packages: dict[str, Path]) -> None:
    library = {path.relative_to(ROOT).as_posix() for path in (ROOT / "grass_ds").rglob("*") if path.suffix != ".pyc"}
    library = {name for name in library if (ROOT / name).is_file()}
    assert "grass_ds/py.typed" in library
    with zipfile.ZipFile(packages["wheel"]) as wheel:
        names = set(wheel.namelist())
    assert {name for name in names if ".dist-info/" not in name} == library
    with tarfile.open(packages["sdist"]) as sdist:
        inside = {name.partition("/")[2] for name in sdist.getnames()}
    assert library | {"LICENSE", "README.md", "pyproject.toml"} <= inside
    stem = f"grass_ds-{PROJECT['version']}"
    assert [path.name for path in packages.values()] == [f"{stem}-py3-none-any.whl", f"{stem}.tar.gz"]


@pytest.mark.all
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_each_alone_runs_the_readmes_loop(packages: dict[str, Path], tmp_path: Path, kind: str) -> None:
    python = empty_environment(tmp_path / "venv")
    options = ("--no-index", "--no-deps", "--no-build-isolation", "--force-reinstall", "--quiet")
    run(python, "-m", "pip", "install", *options, packages[kind], folder=tmp_path)
    (tmp_path / "loop.py").write_text(BEFORE + code_blocks((ROOT / "README.md").read_text(), "python")[0] + AFTER)
    file, version = run(python, "loop.py", folder=tmp_path).splitlines()[-1].split()
    assert Path(file).is_relative_to(tmp_path / "venv")
    assert version == PROJECT["version"]
    assert "a training program" in run(tmp_path / "venv/bin/grass-ds", "--help", folder=tmp_path)


def test_the_version_stands_in_one_place() -> None:
    """In pyproject.toml; the changelog's newest section is about it."""
    changes = (ROOT / "CHANGELOG.md").read_text()
    newest = re.search(r"^## (?:\[Unreleased\] )?\[?(\d[\w.]*)", changes, flags=re.MULTILINE)
    assert newest is not None
    assert newest[1] == PROJECT["version"]
    assert grass_ds.__version__ in (PROJECT["version"], "0+source")
    files = [path for path in (ROOT / "grass_ds").rglob("*.py") if f'"{PROJECT["version"]}"' in path.read_text()]
    assert files == []


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_an_image_is_made_of_what_is_here(name: str) -> None:
    """Images are not built in the tests. What they copy exists, and their shell lines are well-formed."""
    text = (ROOT / "docker" / f"{name}.Dockerfile").read_text()
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    steps = [line.split(maxsplit=1) for line in lines]
    assert {step for step, _ in steps} <= {"ARG", "FROM", "RUN", "WORKDIR", "ENV", "COPY", "CMD"}
    copied = [source for step, rest in steps if step == "COPY" for source in rest.split()[:-1]]
    assert copied and all((ROOT / source).exists() for source in copied)
    shell = [rest for step, rest in steps if step == "RUN"]
    assert any("libaio-dev" in line for line in shell)
    for line in shell:
        assert subprocess.run(["bash", "-n", "-c", line], check=False).returncode == 0, line
    extras = {extra for line in shell for found in re.findall(r"\.\[(.+?)\]", line) for extra in found.split(",")}
    assert extras and extras <= PROJECT["optional-dependencies"].keys()
