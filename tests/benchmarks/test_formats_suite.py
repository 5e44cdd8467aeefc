# SPDX-License-Identifier: Apache-2.0
"""Suite ``formats``: its cases differ in format alone; its tables compare equal seeds, layers and tiers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.markdown import lines_under

from benchmarks import render, run
from benchmarks.case import Case, Request
from benchmarks.formats import suite, tables
from benchmarks.formats.suite import BASE, FORMATS, GAMMAS, TIERS
from benchmarks.methods import grass_config
from benchmarks.quality.suite import SEEDS
from benchmarks.suites import SUITES
from benchmarks.worker import CONDITIONS


def cases(kind: str, rounds: int = 1) -> list[Case]:
    return [case for case in suite.cases(Request(rounds=rounds)) if case.kind == kind]


def name_of(case: Case) -> str:
    return str(case.grass["offload"]["state_format"])


def row(case: Case, **measured: Any) -> dict[str, Any]:
    """A row as far as this suite reads it."""
    machine = {"device": "cpu", "hardware": "any", "threads": 1, "jobs": 1, "commit": "0a", "versions": {"torch": "2"}}
    data = {"dev_rows": 8, "test_rows": 8, "ranks": 1, "task": case.task}
    return {**{name: getattr(case, name) for name in CONDITIONS}, **machine, **data, **measured}


def test_losses_are_of_runs_that_differ_in_format_alone() -> None:
    found = cases("quality")
    every = {(case.seed, case.grass["num_active_layers"], name_of(case)) for case in found}
    assert len(every) == len(found) == len(GAMMAS) * (3 * len(SEEDS) + 1)
    assert {seed for seed, _, name in every if name == "exact"} == {0}
    for case in found:
        gamma = case.grass["num_active_layers"]
        assert (case.steps, case.lr, case.method) == (200, 1.6e-3 / gamma, "uniform")
        block = grass_config(case)
        assert block is not None
        assert (block.offload.state_format, block.num_active_layers, block.seed) == (name_of(case), gamma, case.seed)
        plain = {**case.grass, "offload": {"state_format": BASE}}
        assert replace(case, grass=plain) in found


def test_costs_are_of_every_format_on_every_tier() -> None:
    found = cases("cost", rounds=2)
    assert [(case.seed, case.offload, name_of(case)) for case in found] == [
        (seed, tier, name) for seed in (0, 1) for tier in TIERS for name in FORMATS
    ]
    for case in found:
        block = grass_config(replace(case, disk="/disk"))
        assert block is not None and block.offload.state_format == name_of(case)
        assert block.offload.device == (case.offload or "").split("-")[0]


def test_another_precision_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With fp32 weights there are no master weights beside them."""
    assert SUITES["formats"].dtype == "bf16"
    with pytest.raises(SystemExit, match="--dtype fp32: this suite is about bf16"):
        run.choose_precision("fp32", tmp_path / "formats.jsonl", "bf16")


def test_formats_are_compared_at_equal_seeds(tmp_path: Path) -> None:
    losses = {
        (2, BASE): [1.0, 2.0, 3.0],
        (2, "exact"): [1.0],
        (2, "8bit"): [1.5, 2.0, 3.0],
        (8, "bf16"): [9.0],  # without its pair
    }
    rows = []
    for case in cases("quality"):
        if case.seed < len(reached := losses.get((case.grass["num_active_layers"], name_of(case)), [])):
            loss = reached[case.seed]
            rows.append(row(case, test_loss=loss, dev_loss=2 * loss, cpu_seconds=400.0))
    for case in cases("cost", rounds=2):
        if case.offload == "nvme-stream" and name_of(case) in (BASE, "8bit"):
            ours = name_of(case) == "8bit"
            seconds = [(2.0 if ours else 1.0) * (1 + case.seed)] * 3
            state = {"device": 1e6, "host": 2e6, "nvme": 4e6 if ours else 12e6}
            rows.append(row(case, seconds=seconds, bytes={"optimizer_state": state}))
    blocks = tables.tables(rows)
    plain, exact, eight, alone = (list(line.values()) for line in lines_under("Formats: test loss", blocks))
    assert plain == ["2", BASE, "2.000 ± 1.000", "", "", "", "", "2.00", "3"]
    assert exact == ["2", "exact", "1.000", "+0.000", "", "1.0000", "+0.000", "2.00", "1"]
    # 4.30 * 0.289 / sqrt(3) to both sides of 1 / 6
    ours = ["+0.167 ± 0.289", "-0.550 to +0.883", "1.1667", "+0.333 ± 0.577", "2.00", "3"]
    assert eight == ["2", "8bit", "2.167 ± 0.764", *ours]
    assert alone == ["8", "bf16", "9.000", "", "", "", "", "2.00", "1"]
    plain, eight = (list(line.values()) for line in lines_under("Formats: time and bytes of state", blocks))
    assert plain == ["nvme-stream", BASE, "1.50", "", "1.0", "2.0", "12.0"]
    assert eight == ["nvme-stream", "8bit", "3.00", "2.000", "1.0", "2.0", "4.0"]
    (tmp_path / "formats.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert "## Formats of optimizer state" in render.results(tmp_path)
