# SPDX-License-Identifier: Apache-2.0
"""README and the pages of ``docs/``: their code runs, their commands, links and file names exist, and they stay readable."""

import importlib.util
import itertools
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.markdown import code_blocks

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (*ROOT.glob("*.md"), *sorted(ROOT.glob("docs/*.md")), ROOT / "benchmarks/README.md")
}
ROOMS = "grass_ds|launch|tests|docs|ds_configs|benchmarks|slurm"
OWN_LOOP = 0  # the block of README that builds an engine, for blocks elsewhere that use one


def blocks(page: str, language: str) -> list[str]:
    return code_blocks(PAGES[page], language)


def prose(page: str) -> str:
    """A page, or another Markdown file, without its code blocks."""
    return re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)


def commands() -> list[tuple[str, list[str]]]:
    """Page and words of every command in a shell block."""
    pages = [page for page in PAGES if page != OF_FRONT_ENDS]
    lines = [
        (page, line) for page in pages for b in blocks(page, "bash") for line in b.replace("\\\n", " ").splitlines()
    ]
    return [(page, words) for page, line in lines if (words := shlex.split(line, comments=True))]


# ---- code ----------------------------------------------------------------------------------------------------------------

# Its Python is a module and not a script, which its JSON names: tests/sampling/test_own_sampler.py runs both.
OF_A_SAMPLER = "docs/sampling.md"
# Needs packages that are not here: tests/front_ends runs all of its blocks.
OF_FRONT_ENDS = "docs/recipes.md"
PYTHON = [
    (page, index)
    for page in PAGES
    if page not in (OF_A_SAMPLER, OF_FRONT_ENDS)
    for index in range(len(blocks(page, "python")))
]


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
        exec(compile(code, "block", "exec"), names)
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
@pytest.mark.parametrize(("page", "index"), PYTHON)
def test_python_blocks_run(two_ranks: Any, tmp_path: Path, page: str, index: int) -> None:
    code = blocks(page, "python")[index]
    if re.search(r"\bengine\b", code) and "initialize(" not in code:
        code = blocks("README.md", "python")[OWN_LOOP] + code
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    for result in two_ranks.run(run_block, code=code, folder=str(tmp_path), timeout=300):
        assert sum(result["visits"]) > 0
        trained = {f"model.layers.{i}." for i, visits in enumerate(result["visits"]) if visits}
        assert result["moved"]
        assert all(name == "model.norm.weight" or name.startswith(tuple(trained)) for name in result["moved"])
    if "save_model(" in code:
        assert (tmp_path / "out" / "model.safetensors").exists()
    if "Trainer(" in code:
        assert list((tmp_path / "out" / "plots").glob("*.png"))
        assert (tmp_path / "out" / "grass_history.jsonl").exists()


def test_python_is_shown() -> None:
    """README shows an own loop and a Trainer; docs show more."""
    assert [page for page, _ in PYTHON].count("README.md") == 2
    assert {page for page, _ in PYTHON} >= {"README.md", "docs/own_loop.md", "docs/trainer.md", "docs/cluster.md"}


def test_shell_blocks_name_what_exists() -> None:
    assert len(commands()) >= 10
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for page, words in commands():
        files = [word for word in words if re.fullmatch(rf"({ROOMS})/\S+", word)]
        modules = [module for flag, module in itertools.pairwise(words) if flag == "-m" and module != "not dist"]
        asked = [extra for word in words for part in re.findall(r"^\.\[(.+)\]$", word) for extra in part.split(",")]
        assert files or modules or words[:2] == ["pip", "install"], (page, words)
        assert [file for file in files if not (ROOT / file).is_file()] == [], page
        assert [module for module in modules if not importlib.util.find_spec(module)] == [], page
        assert [extra for extra in asked if extra not in extras] == [], page


def test_json_blocks_are_accepted() -> None:
    from grass_ds.config import parse_grass_block

    shown = [block for page in PAGES if page != OF_A_SAMPLER for block in blocks(page, "json")]
    assert len(shown) >= 2
    for block in shown:
        parse_grass_block(json.loads("{" + block + "}"))


def test_diagrams_are_well_formed() -> None:
    """Mermaid ends a statement at a semicolon, and draws nothing then."""
    diagrams = [diagram for page in PAGES for diagram in blocks(page, "mermaid")]
    assert len(diagrams) >= 4
    assert all(re.match(r"flowchart|sequenceDiagram", diagram) and ";" not in diagram for diagram in diagrams)


# ---- names ---------------------------------------------------------------------------------------------------------------


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), (page, target)
        if anchor:
            assert anchor in anchors(path.resolve().relative_to(ROOT).as_posix()), (page, target)


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_named_files_exist(page: str) -> None:
    named = re.findall(rf"`((?:{ROOMS})/[\w./-]*)`", prose(page))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_walks_name_what_exists() -> None:
    """Classes, and notes in the code, of docs/architecture.md."""
    code = "\n".join(path.read_text() for path in (ROOT / "grass_ds").rglob("*.py"))
    page = " ".join(PAGES["docs/architecture.md"].split())
    classes = re.findall(r"`((?:[A-Z][a-z0-9]+){2,}|Controller|Schedule)`", page)
    notes = re.findall(r"\[Note: [^\]]+\]", page)
    assert len(classes) >= 10
    assert len(notes) >= 4
    assert [name for name in classes if not re.search(rf"^class {name}\b", code, flags=re.MULTILINE)] == []
    assert [note for note in notes if note not in code] == []


def test_every_page_is_linked_from_the_readme() -> None:
    assert [page for page in PAGES if page != "README.md" and f"({page})" not in PAGES["README.md"]] == []


def test_the_tree_shows_what_is_there() -> None:
    """Every room and file of the library but the small ones, and nothing else."""
    [tree] = [block for block in blocks("README.md", "text") if block.startswith("grass_ds/")]
    top, rooms = re.findall(r"^(\S+)", tree, flags=re.MULTILINE), re.findall(r"^  (\S+)", tree, flags=re.MULTILINE)
    assert [name for name in top if not (ROOT / name).exists()] == []
    assert [name for name in rooms if not (ROOT / "grass_ds" / name).exists()] == []
    folders = {f"{path.parent.name}/" for path in (ROOT / "grass_ds").glob("*/__init__.py")}
    assert folders - set(rooms) == set()


# ---- form ----------------------------------------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 170


@pytest.mark.parametrize("page", PAGES)
def test_lines_are_short(page: str) -> None:
    """Tables and what benchmarks generate are as wide as they are."""
    text = re.sub(r"^<!-- benchmark .*?^<!-- end of", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    wide = [line for line in text.splitlines() if len(line) > 119 and not line.lstrip().startswith("|")]
    assert wide == []


def test_the_config_page_is_generated() -> None:
    spec = importlib.util.spec_from_file_location("write_config", ROOT / "docs" / "write_config.py")
    assert spec is not None
    assert spec.loader is not None
    write_config = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(write_config)
    assert PAGES["docs/config.md"] == write_config.page(), "run: python docs/write_config.py"
