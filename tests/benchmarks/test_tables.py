# SPDX-License-Identifier: Apache-2.0
"""The cost tables: what their figures are, from rows with known values."""

from pathlib import Path
from typing import Any

import pytest
from helpers.markdown import lines_of, lines_under

from benchmarks import cost_model, render
from benchmarks.checkpoint import tables as checkpoint_tables
from benchmarks.cpu import growth
from benchmarks.cpu import tables as cpu_tables
from benchmarks.cpu.targets import target_table
from benchmarks.gpu import tables as gpu_tables
from benchmarks.offload import tables as offload_tables
from benchmarks.report.row_groups import group_rows, setting
from benchmarks.report.table import table
from benchmarks.suites import SUITES


def row(method: str = "grass", stage: int = 2, seconds: tuple[float, ...] = (1.0,), **changed: Any) -> dict[str, Any]:
    """A row as far as the tables read it."""
    steps = len(seconds)
    parts = {"forward": 0.5, "backward": 0.25, "step": 0.125}
    return {
        "kind": "cost",
        "method": method,
        "model": "tiny",
        "dtype": "bf16",
        "stage": stage,
        "ranks": 2,
        "micro_batch": 2,
        "accumulation": 1,
        "sequence": 100,
        "checkpointing": False,
        "prepare_state": False,
        "offload": None,
        "seed": 0,
        "temperature": None,
        "grass": {"sample_period": 5},
        "device": "cpu",
        "hardware": "any",
        "threads": 1,
        "jobs": 1,
        "commit": "0123abc",
        "versions": {"torch": "2"},
        "seconds": list(seconds),
        "steps": steps,
        **{f"{part}_seconds": [share] * steps for part, share in parts.items()},
        "probe_seconds": [],
        "active": [None] * steps,
        "changed": [None] * steps,
        "moved_frozen": [None] * steps,
        "first_steps": 0,
        "baseline_bytes": 1e9,
        "train_peak_bytes": 2e9,
        "peak_bytes": 3e9,
        "resident_bytes": 2e9,
        "disk_bytes": {"read": 3e6, "written": 6e6},
        "bytes": {"optimizer_state": {"device": 1_500_000, "host": 2_000_000, "nvme": 3_000_000}},
        "trainable": 2_000_000,
        "shape": {"layers": 4, "layer_numel": 1_000_000, "norm_numel": 0, "tied": False},
        "observed": {
            "active": None,
            "flops": 300,
            "traffic": {"all_gather": 6_000_000, "all_reduce": 4},
            "calls": {"all_gather": 3, "all_reduce": 1},
            "rest_bytes": 5e6,
            "peak_bytes": 12e6,
        },
        **changed,
    }


@pytest.fixture
def known_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_model, "flops", lambda row, active: 300)
    monkeypatch.setattr(cost_model, "traffic", lambda row, active: {"reduce_scatter": 3_000_004})
    monkeypatch.setattr(cost_model, "memory", lambda row, active: {"total": 10e6})
    monkeypatch.setattr(cost_model, "seconds", lambda row: [row["plain"]] * len(row["seconds"]))


def test_results_and_readme_match_their_rows_in_short_cells() -> None:
    assert render.results() == render.RESULTS.read_text()
    assert render.readme() == render.README.read_text()
    lines = [line for line in render.results().splitlines() if line.startswith("|")]
    assert len(lines) > 400
    assert max(len(cell.strip()) for line in lines for cell in line.strip("|").split("|")) <= 40


def test_suites_without_rows_have_no_tables(tmp_path: Path) -> None:
    assert all(suite.tables([]) == [] for suite in SUITES.values())
    assert "### " not in render.results(tmp_path)
    assert render.BLOCK.search(render.readme(tmp_path))


def test_columns_without_values_are_left_out() -> None:
    text = table("Title", ["a", "b"], {"one": str.upper, "none": lambda _: "", "two": lambda g: g if g == "a" else ""})
    assert text == "### Title\n\n| one | two |\n| --- | --- |\n| A | a |\n| B |  |"
    assert table("Title", [], {"one": str}) == ""


def test_ratios_are_within_the_round_and_the_setting(known_costs: None) -> None:
    rows = [
        row("full", seconds=(4.0, 4.0, 10.0)),
        row("full", seconds=(8.0, 8.0, 8.0), accumulation=4),
        row("lora", seconds=(3.0, 3.0, 3.0)),
        row("grass", seconds=(1.0, 1.0, 1.0), active=[[0], [0], [1]], probe_seconds=[9.0]),
        row("grass", seconds=(4.0, 4.0, 4.0), accumulation=4),
        row("full", seconds=(2.0, 2.0, 2.0), seed=1),
        row("grass", seconds=(1.0, 1.0, 1.0), seed=1),
        row("grass", seconds=(5.0, 5.0, 5.0), seed=2),  # in a round without its base
    ]
    blocks = cpu_tables.tables(rows)
    seconds = lines_under("Time per step", blocks)
    # Methods in their defaults, then the variants.
    assert [line["method"] for line in seconds] == [
        "full",
        "lora",
        "grass",
        "full, accumulation 4",
        "grass, accumulation 4",
    ]
    assert seconds[2] == {
        "method": "grass",
        "ZeRO": "2",
        "s / step": "1.00 (1.00 to 5.00)",
        "of full, ZeRO-2": "0.33 (0.17 to 0.50)",
        "of LoRA r=128": "0.33",
        "tokens/s": "400",
    }
    assert seconds[4]["of full, ZeRO-2"] == "0.50"
    parts = lines_under("Parts of a step, seconds", blocks)[2]
    assert [parts[name] for name in ("forward", "backward", "`step()`", "lowest layer trained")] == [
        "0.50",
        "0.25",
        "0.12",
        "0.3",
    ]
    (probing,) = lines_under("Switching and probing", blocks)
    assert (probing["s / probing step"], probing["share of a run of 1000"]) == ("9.00", "15.5%")  # 20 of them


def test_switches_are_compared_with_the_rest_of_their_period() -> None:
    active = [[0], [0], [1], [1], [1], [2]]
    assert cpu_tables.after_switch(row(seconds=(9.0, 9.0, 3.0, 1.0, 2.0, 7.0), active=active)) == [2.0]
    assert cpu_tables.after_switch(row("full", seconds=(1.0, 2.0))) == []


def test_memory_traffic_and_the_cost_model(known_costs: None) -> None:
    plain = {"forward": 0.25, "backward": 0.375, "adam": 0.125, "traffic": 0.5}
    blocks = cpu_tables.tables([row(seconds=(1.0, 2.0), plain=plain), row(seconds=(1.0, 1.0), seed=1)])
    (process,) = lines_under("Memory of a process, GB", blocks)
    assert (process["peak RSS"], process["while training, above imports"]) == ("3.00", "1.00 (1.00 to 1.00)")
    assert process["Adam state in the end"] == "0.02"
    (live,) = lines_under("Live tensors of a rank, MB", blocks)
    assert (live["at rest"], live["peak"], live["weights trained, M"]) == ("5", "12", "2.0")
    (traffic,) = lines_under("Traffic of a rank per step", blocks)
    assert (traffic["sent, MB"], traffic["collectives"]) == ("6.0", "4")
    (ratios,) = lines_under("Measured, of the cost model", blocks)
    assert [ratios[name] for name in ("FLOPs", "traffic", "memory", "time")] == [
        "1.00 (1.00 to 1.00)",
        "2.00 (2.00 to 2.00)",
        "1.20 (1.20 to 1.20)",
        "1.20",
    ]
    (above,) = lines_under("Seconds above plain PyTorch", blocks)
    assert list(above.values())[2:] == ["+0.25", "-0.12", "+0.00", "0.50"]


def test_steps_of_others_are_told_that_change_nothing_or_too_much(known_costs: None) -> None:
    rows = [
        row("lisa-toggle", seconds=(1.0,) * 3, changed=[True] * 3, moved_frozen=[28, 28, 27]),
        row("badam-package", 3, seconds=(1.0,) * 2, changed=[True, False], moved_frozen=[0, 0]),
        row("grass"),
    ]
    toggle, badam = lines_under("What steps of others' methods changed", cpu_tables.tables(rows))
    assert list(toggle.values()) == ["lisa-toggle", "2", "3", "0", "28 (27 to 28)"]
    assert list(badam.values()) == ["badam-package", "3", "2", "1", "0 (0 to 0)"]


def test_targets_are_judged_by_what_was_measured(known_costs: None) -> None:
    rows = [row("full", seconds=(4.0,)), row("lora", seconds=(2.0,)), row("grass", seconds=(1.2,))]
    rows.append(row("grass", seconds=(0.1,), offload="none"))
    judged = [list(line.values()) for line in lines_of(target_table(rows))]
    assert ["time, of full on ZeRO-2", "grass", "2", "0.35", "0.30", "met"] in judged
    assert ["time, of LoRA r=128", "grass", "2", "0.52", "0.60", "**missed**"] in judged
    assert ["live tensors, of the cost model", "grass", "2", "1.10", "1.20", "**missed**"] in judged
    assert {line[2] for line in judged} == {"2"}  # not measured, not judged


def test_growth_is_measured_along_every_axis_and_fitted() -> None:
    rows = []
    for case in growth.growth_cases():
        layers = int(case.model.split("layers=")[1].split(",")[0])
        seconds = layers**2 * case.ranks / 10
        rows.append(row(case.method, seconds=(seconds,), model=case.model, grass=case.grass, ranks=case.ranks))
    for axis in growth.AXES:
        for method in axis.methods:
            assert [value for value, _ in growth.along(axis, method, rows)] == sorted(axis.values)
    found = {(line["number"], line["method"]): line for line in lines_of(growth.growth_tables(rows)[0])}
    assert found["layers", "grass"]["values"] == "6, 12, 24, 48"
    assert found["layers", "grass"]["measured"] == "7.2, 28.8, 115, 461"
    assert (found["layers", "grass"]["exponent"], found["layers", "grass"]["residual"]) == ("2.00", "0.00")
    assert found["ranks", "full"]["exponent"] == "1.00"
    assert found["active layers", "grass"]["exponent"] == "0.00"
    fitted = growth.fit([(1.0, 1.0), (2.0, 8.0), (4.0, 4.0)])
    assert fitted == (pytest.approx(1.0), pytest.approx(0.6535, rel=1e-3))
    assert growth.fit([(1.0, 0.0), (2.0, 1.0)]) is None


def offloaded(offload: str | None, seconds: tuple[float, ...], **changed: Any) -> dict[str, Any]:
    steps = {"step_seconds": [0.25, 0.5, 0.75], "active": [[0, 1], [0, 1], [2, 3]]}
    return row("uniform", seconds=seconds, offload=offload, **{**steps, **changed})


def test_offload_compares_the_same_step_of_the_same_layers() -> None:
    base = [offloaded("none", (1.0, 2.0, 4.0)), offloaded("none", (1.0, 1.0, 1.0), seed=1)]
    mine = [
        offloaded("cpu-stream", (3.0, 1.0, 1.0), seed=1),
        offloaded("cpu-stream", (2.0, 2.0, 4.0), step_seconds=[0.5, 0.5, 2.0]),
    ]
    assert offload_tables.step_ratios(mine, base) == [[2.0, 1.0, 1.0], [3.0, 1.0, 1.0]]
    blocks = offload_tables.tables([*base, *mine])
    seconds = lines_under("Offload: time per step", blocks)[-1]
    assert seconds["median, of none"] == "1.000 (1.000 to 1.000)"
    assert seconds["all steps, of none"] == "1.300"  # 13 s against 10 s
    added = lines_under("Offload: time in `step()`", blocks)[-1]
    assert list(added.values())[1:] == ["500", "+250 ms", "+15.0%"]  # 0.5 s in one of two rounds, of 10 s in six steps
    memory = lines_under("Offload: memory of a rank", blocks)[-1]
    assert list(memory.values())[1:] == ["2.00", "3.00", "1.5", "2.0", "3.0"]
    assert list(lines_under("Offload: disk traffic of a rank", blocks)[-1].values())[1:] == ["1.0", "2.0"]


@pytest.mark.parametrize("changed", [{"active": [[0, 1], [0, 1], [0, 3]]}, {"seed": 1}])
def test_other_layers_have_no_ratio(changed: dict[str, Any]) -> None:
    base = [offloaded("none", (1.0, 1.0, 1.0))]
    with pytest.raises(ValueError, match="trained different layers"):
        offload_tables.step_ratios([offloaded("cpu-stream", (1.0, 1.0, 1.0), **changed)], base)


def test_gpu_tables_name_what_did_not_fit_and_what_the_paper_says() -> None:
    common = {"model": "llama2-7b-random", "stage": 2, "ranks": 1}
    skipped = {**row("full"), **common, "skipped": "out of memory on a device of 80 GB"}
    ours = offloaded("none", (1.0, 2.0, 3.0), **{**common, "stage": 2})
    other = offloaded("none", (4.0, 4.0, 4.0), micro_batch=4, **common)
    blocks = gpu_tables.tables(
        [skipped, ours, other, row("grass", seconds=(1.0,) * 3, model=common["model"], ranks=1)]
    )
    seconds = lines_under("llama2-7b-random: time per step", blocks)
    assert seconds[0]["median s / step"] == "out of memory on a device of 80 GB"
    assert list(seconds[1].values())[5:] == [
        "2.000",
        "100",
        "1.000 (1.000 to 1.000)",
        "1.000",
    ]  # 2 x 100 tokens in 2 s
    assert (seconds[2]["batch"], seconds[2]["median, of none"]) == ("4", "1.000 (1.000 to 1.000)")  # of its own batch
    memory = lines_under("llama2-7b-random: memory of a device", blocks)
    assert [line["in the paper, GB"] for line in memory] == ["51.32", "", "", "19.08"]
    assert [line["peak, GB"] for line in memory] == ["", "3.00", "3.00", "3.00"]


def test_checkpoints_are_compared_with_stock_in_the_same_round() -> None:
    common = {
        "kind": "checkpoint",
        "async": False,
        "step_seconds": [1.0],
        "checkpoint_bytes": 4e6,
        "disk_seconds": 3.0,
    }
    rows = [
        row("full", **common, stall_seconds=2.0),
        row("grass", **common, stall_seconds=1.0),
        row("full", **common, stall_seconds=4.0, seed=1),
        row("grass", **common, stall_seconds=1.0, seed=1),
        row("grass", **common, stall_seconds=9.0, seed=2),  # in a round without stock
        row("grass", **{**common, "async": True}, stall_seconds=1.0, prepare_state=True, seconds_meanwhile=[1.5]),
    ]
    blocks = checkpoint_tables.tables(rows)
    stalls = lines_under("Checkpoints: time", blocks)
    assert [line["checkpoint"] for line in stalls] == ["full", "grass, early", "grass, late, async"]
    assert (stalls[1]["stall, s"], stalls[1]["of stock"]) == ("1.00", "0.38 (0.25 to 0.50)")
    assert stalls[2]["meanwhile"] == "1.50"
    assert lines_under("Checkpoints: size", blocks)[1]["of stock"] == "1.00"


def test_variants_have_labels_of_their_own() -> None:
    changes = [{}, {"offload": "none"}, {"accumulation": 4}, {"checkpointing": True}, {"prepare_state": True}]
    labels = [group.setting.label for group in group_rows([row(**change) for change in changes])]
    assert len(set(labels)) == len(changes) == len({setting(row(**change)) for change in changes})
