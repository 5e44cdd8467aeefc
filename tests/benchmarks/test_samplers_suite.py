# SPDX-License-Identifier: Apache-2.0
"""Suite ``samplers``: its cases differ in sampler, seed and task, adapters in the rate, too; its tables compare equal seeds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.markdown import lines_under

from benchmarks import render
from benchmarks.case import Case, Request
from benchmarks.methods import METHODS, grass_config
from benchmarks.quality.suite import COMPARED_TASKS, SEEDS, SETTINGS, STEPS
from benchmarks.samplers import suite, tables
from benchmarks.samplers.suite import BASE, GAMMA, RATE, RATES, SAMPLERS
from benchmarks.worker import CONDITIONS


def cases() -> list[Case]:
    return list(suite.cases(Request(tasks=COMPARED_TASKS)))


def row(case: Case, loss: float, accuracy: float) -> dict[str, Any]:
    """A row as far as this suite reads it."""
    machine = {"device": "cpu", "hardware": "any", "threads": 1, "jobs": 1, "commit": "0a", "versions": {"torch": "2"}}
    data = {"data": "0a", "train_rows": {"gsm8k": 9}, "dev_rows": 8, "test_rows": 8, "ranks": 1, "task": case.task}
    measured = {"test_loss": loss, "dev_loss": loss, "accuracy": {"one": accuracy, "two": accuracy}}
    return {**{name: getattr(case, name) for name in CONDITIONS}, **machine, **data, **measured}


def test_cases_differ_in_sampler_seed_task_and_the_rate_of_adapters() -> None:
    found = cases()
    assert [(case.seed, case.task, case.method) for case in found] == [
        (seed, task, sampler) for seed in SEEDS for task in COMPARED_TASKS for sampler in SAMPLERS
    ]
    first = {case.task: case for case in found if (case.seed, case.method) == (0, BASE)}
    for case in found:
        assert replace(case, seed=0, method=BASE, lr=RATE) == first[case.task]
        assert (case.steps, case.answers) == (STEPS, True)
        assert case.lr == RATES.get(case.method, 1.6e-3 / GAMMA)


@pytest.mark.parametrize("case", cases()[: len(SAMPLERS)], ids=lambda case: case.method)
def test_a_case_has_the_block_of_its_sampler(case: Case) -> None:
    block = grass_config(case)
    assert block is not None and (METHODS[case.method].grass or {})["sampler"] == block.sampler
    names = {"stratified": ("uniform", True), "grass-stratified": ("grass", True)}
    assert (block.sampler, block.stratified) == names.get(case.method, (case.method, False))
    assert (block.num_active_layers, block.seed) == (GAMMA, case.seed)
    assert {name: getattr(block, name) for name in SETTINGS} == SETTINGS


def test_samplers_are_compared_at_equal_seeds(tmp_path: Path) -> None:
    by_name = {(case.task, case.method, case.seed): case for case in cases()}
    reached = {
        ("arithmetic", "uniform", 0): (1.5, 0.25),
        ("arithmetic", "uniform", 1): (2.0, 0.75),
        ("arithmetic", "outlier", 0): (1.0, 0.5),
        ("arithmetic", "outlier", 1): (3.0, 0.5),
        ("arithmetic", "cyclic", 2): (9.0, 0.0),  # without its pair
        ("choice", "outlier", 0): (7.0, 1.0),
    }
    rows = [row(by_name[key], *figures) for key, figures in reached.items()]
    arithmetic, choice = (tables.tables([one for one in rows if one["task"] == task]) for task in COMPARED_TASKS)
    title = "Test loss and accuracy"
    outlier, uniform, cyclic = (list(line.values()) for line in lines_under(title, arithmetic))
    # 12.71 * 1.061 / sqrt(2) to both sides of the difference
    mean, differs, between = "2.000 ± 1.414", "+0.250 ± 1.061", "-9.282 to +9.782"
    assert outlier == ["outlier", mean, differs, between, "0.500 ± 0.000", "+0.000 ± 0.354", "2"]
    assert uniform == ["uniform", "1.750 ± 0.354", "", "", "0.500 ± 0.354", "", "2"]
    assert cyclic == ["cyclic", "9.000", "", "", "0.000", "", "1"]
    assert lines_under(title, choice) == [
        {"sampler": "outlier", "test loss": "7.000", "accuracy": "1.000", "seeds": "1"}
    ]
    assert "- 8 layers at a time, learning rate 0.0002, 0.0004 for ist\n" in arithmetic[3]
    (tmp_path / "samplers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    sections = [line for line in render.results(tmp_path).splitlines() if line.startswith("## Samplers")]
    assert sections == ["## Samplers", "## Samplers: task `arithmetic`", "## Samplers: task `choice`"]
    both = {
        line["sampler"]: list(line.values()) for line in lines_under("Test loss on all tasks", tables.tables(rows))
    }
    assert both["outlier"] == ["outlier", mean, differs, between, "7.000"]
    assert both["uniform"][:2] == ["uniform", "1.750 ± 0.354"]
