# SPDX-License-Identifier: Apache-2.0
"""The cost tables: what their figures are, from rows with known values."""

from pathlib import Path
from typing import Any

import pytest
from helpers.markdown import lines_under

from benchmarks import cost_model, render
from benchmarks.checkpoint import tables as checkpoint_tables
from benchmarks.cpu import tables as cpu_tables
from benchmarks.gpu import tables as gpu_tables
from benchmarks.offload import tables as offload_tables
from benchmarks.report.row_groups import group_rows, setting
from benchmarks.report.table import hardware, table


def row(method: str = "grass", stage: int = 2, seconds: tuple[float, ...] = (1.0,), **changed: Any) -> dict[str, Any]:
    """A row as far as the tables read it."""
    steps = len(seconds)
    shape = {"layers": 4, "layer_numel": 1_000_000, "norm_numel": 0, "tied": False}
    case = {"kind": "cost", "method": method, "model": "tiny", "dtype": "bf16", "stage": stage, "ranks": 2, "seed": 0}
    batch = {"micro_batch": 2, "accumulation": 1, "sequence": 100, "checkpointing": False, "steps": steps}
    ours = {"grass": {"sample_period": 5}, "offload": None, "prepare_state": False, "temperature": None}
    machine = {"device": "cpu", "hardware": "any", "threads": 1, "jobs": 1, "commit": "0a", "versions": {"torch": "2"}}
    memory = {"baseline_bytes": 1e9, "train_peak_bytes": 2e9, "peak_bytes": 3e9, "resident_bytes": 2e9}
    observed = {
        **{"active": None, "flops": 300, "rest_bytes": 5e6, "peak_bytes": 12e6},
        "traffic": {"all_gather": 6_000_000, "all_reduce": 4},
        "calls": {"all_gather": 3, "all_reduce": 1},
    }
    return {
        **{**case, **batch, **ours, **machine, **memory, "observed": observed, "shape": shape},
        "seconds": list(seconds),
        "forward_seconds": [0.5] * steps,
        "backward_seconds": [0.25] * steps,
        "step_seconds": [0.125] * steps,
        "probe_seconds": [],
        "active": [None] * steps,
        "disk_bytes": {"read": 3e6, "written": 6e6},
        "bytes": {"optimizer_state": {"device": 1_500_000, "host": 2_000_000, "nvme": 3_000_000}},
        "trainable": 2_000_000,
        **changed,
    }


@pytest.fixture
def known_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_model, "flops", lambda row, active: 300)
    monkeypatch.setattr(cost_model, "traffic", lambda row, active: {"reduce_scatter": 3_000_004})
    monkeypatch.setattr(cost_model, "memory", lambda row, active: {"total": 10e6})
    monkeypatch.setattr(cost_model, "seconds", lambda row: [row["plain"]] * len(row["seconds"]))


def test_hardware_is_named_where_rows_of_several_kinds_stand_together() -> None:
    first, second = row(), row(hardware="other, 2 cores, 24 GiB")
    assert hardware([first], among=[first, first]) == ""
    assert hardware([first], among=[first, second]) == "any"
    assert hardware([second, first], among=[first, second]) == "any / other"


def test_results_and_readme_match_their_rows_in_short_cells() -> None:
    assert render.results() == render.RESULTS.read_text()
    assert render.readme() == render.README.read_text()
    lines = [line for line in render.results().splitlines() if line.startswith("|")]
    assert len(lines) > 400
    assert max(len(cell.strip()) for line in lines for cell in line.strip("|").split("|")) <= 40


def test_suites_without_rows_have_no_tables(tmp_path: Path) -> None:
    assert "### " not in render.results(tmp_path)
    assert render.BLOCK.search(render.readme(tmp_path))


def test_lines_and_columns_without_figures_are_left_out() -> None:
    columns = {"none": lambda _: "", "two": lambda group: group if group == "a" else ""}
    assert table("Title", ["a", "b"], {"one": str.upper}, columns) == (
        "### Title\n\n| one | two |\n| --- | --- |\n| A | a |"
    )
    assert table("Title", [], {"one": str}, columns) == ""


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
    labels = ["full", "lora", "grass", "full, accumulation 4", "grass, accumulation 4"]
    assert [line["method"] for line in seconds] == labels
    figures = ["grass", "2", "1.00 (1.00 to 5.00)", "0.33 (0.17 to 0.50)", "0.33", "400"]
    assert list(seconds[2].values())[:6] == figures
    assert seconds[4]["of full, ZeRO-2"] == "0.50"
    parts = lines_under("Parts of a step, seconds", blocks)[2]
    assert list(parts.values())[2:6] == ["0.50", "0.25", "0.12", "0.3"]
    (probing,) = lines_under("Switching and probing", blocks)
    assert (probing["s / probing step"], probing["share of a run of 1000"]) == ("9.00", "15.5%")  # 20 of them


def test_switches_are_compared_with_the_rest_of_their_period() -> None:
    active = [[0], [0], [1], [1], [1], [2]]
    assert cpu_tables.after_switch(row(seconds=(9.0, 9.0, 3.0, 1.0, 2.0, 7.0), active=active)) == [2.0]
    assert cpu_tables.after_switch(row("full", seconds=(1.0, 2.0))) == []


def test_memory_traffic_and_the_cost_model(known_costs: None) -> None:
    plain = {"forward": 0.25, "backward": 0.375, "adam": 0.125, "traffic": 0.5}
    blocks = cpu_tables.tables([row(seconds=(1.0, 2.0), plain=plain), row(seconds=(1.0, 1.0), seed=1)])

    def figures(title: str) -> list[str]:
        (line,) = lines_under(title, blocks)
        return [figure for figure in list(line.values())[2:] if figure]

    assert figures("Memory of a process, GB") == ["3.00", "1.00 (1.00 to 1.00)", "0.02"]
    assert figures("Live tensors of a rank, MB") == ["5", "12", "2.0"]
    assert figures("Traffic of a rank per step") == ["6.0", "4"]
    same = "{0} ({0} to {0})"
    assert figures("Measured, of the cost model") == [*map(same.format, ("1.00", "2.00", "1.20")), "1.20"]
    assert figures("Seconds above plain PyTorch") == ["+0.25", "-0.12", "+0.00", "0.50"]


def offloaded(offload: str | None, seconds: tuple[float, ...], **changed: Any) -> dict[str, Any]:
    steps = {"step_seconds": [0.25, 0.5, 0.75], "active": [[0, 1], [0, 1], [2, 3]]}
    return row("uniform", seconds=seconds, offload=offload, **{**steps, **changed})


def test_offload_compares_the_same_step_of_the_same_layers() -> None:
    base = [offloaded("none", (1.0, 2.0, 4.0)), offloaded("none", (1.0, 1.0, 1.0), seed=1)]
    mine = [
        offloaded("cpu-stream", (3.0, 1.0, 1.0), seed=1),
        offloaded("cpu-stream", (2.0, 2.0, 4.0), step_seconds=[0.5, 0.5, 2.0]),
    ]
    blocks = offload_tables.tables([*base, *mine])
    seconds = lines_under("Offload: time per step", blocks)[-1]
    assert seconds["median, of none"] == "1.000 (1.000 to 1.000)"
    assert seconds["all steps, of none"] == "1.300"  # 13 s against 10 s
    added = lines_under("Offload: time in `step()`", blocks)[-1]
    assert list(added.values())[1:] == ["500", "+250 ms", "+15.0%"]  # 0.5 s in one of two rounds, of 10 s in six steps
    memory = lines_under("Offload: memory of a rank", blocks)[-1]
    assert list(memory.values())[1:] == ["2.00", "3.00", "1.5", "2.0", "3.0"]
    assert list(lines_under("Offload: disk traffic of a rank", blocks)[-1].values())[1:] == ["1.0", "2.0"]


def test_other_layers_have_no_ratio() -> None:
    base, other = offloaded("none", (1.0,) * 3), offloaded("cpu-stream", (1.0,) * 3, active=[[0, 1], [0, 1], [0, 3]])
    with pytest.raises(ValueError, match="trained different layers"):
        offload_tables.tables([base, other])
    (line,) = lines_under("Offload: time per step", offload_tables.tables([{**other, "seed": 1}]))
    assert "all steps, of none" not in line  # in a round without its base


def test_gpu_tables_name_what_did_not_fit_and_what_the_paper_says() -> None:
    common = {"model": "llama2-7b-random", "ranks": 1}
    skipped = {**row("full"), **common, "skipped": "out of memory on a device of 80 GB"}
    ours = offloaded("none", (1.0, 2.0, 3.0), **common)
    other = offloaded("none", (4.0, 4.0, 4.0), micro_batch=4, **common)
    blocks = gpu_tables.tables([skipped, ours, other, row("grass", seconds=(1.0,) * 3, **common)])
    seconds = lines_under("llama2-7b-random: time per step", blocks)
    assert seconds[0]["median s / step"] == "out of memory on a device of 80 GB"
    # 2 x 100 tokens in 2 s
    assert list(seconds[2].values())[4:8] == ["none", "2.000", "100", "1.000 (1.000 to 1.000)"]
    assert (seconds[3]["batch"], seconds[3]["median, of none"]) == ("4", "1.000 (1.000 to 1.000)")  # of its own batch
    memory = lines_under("llama2-7b-random: memory of a device", blocks)
    assert [line["in the paper, GB"] for line in memory] == ["51.32", "19.08", "", ""]
    assert [line["peak, GB"] for line in memory] == ["", "3.00", "3.00", "3.00"]


def test_checkpoints_are_compared_with_stock_in_the_same_round() -> None:
    sizes = {"checkpoint_bytes": 4e6, "disk_seconds": 3.0, "step_seconds": [1.0]}
    common = {"kind": "checkpoint", "async": False, **sizes}
    rows = [
        row("full", **common, stall_seconds=2.0),
        row("grass", **common, stall_seconds=1.0),
        row("full", **common, stall_seconds=4.0, seed=1),
        row("grass", **common, stall_seconds=1.0, seed=1),
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
