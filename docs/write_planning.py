# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of docs/planning.md: ``python docs/write_planning.py``.

With ``--measure`` it first runs those cells of tests/helpers/planned.py on two ranks that docs/planning.json lacks, and
keeps the results there.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE, RESULTS = ROOT / "docs" / "planning.md", ROOT / "docs" / "planning.json"
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

MODELS = ("llama-2-7b", "llama-3-8b", "llama-3-70b")
MACHINES = ((1, 24), (2, 24), (8, 80))
EXAMPLE = {"state_format": "8bit", "checkpointing": True, "micro_batch": 4, "sequence": 1024}


def measure() -> None:
    """Run cells on two ranks, and keep the first rank's numbers."""
    from helpers.planned import CELLS, measure_cells
    from helpers.ranks import RankPool

    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    pool = RankPool(2)
    for name in [name for name in CELLS if name not in found]:
        with tempfile.TemporaryDirectory() as folder:
            [found[name]] = pool.run(measure_cells, names=[name], folder=folder, timeout=600)[0]
        print(name, flush=True)
        RESULTS.write_text(json.dumps({name: found[name] for name in CELLS if name in found}, indent=1) + "\n")
    pool.close()


def validation() -> str:
    """Predicted and measured bytes of every cell."""
    from helpers.planned import PROBING, predicted

    rows = [
        "| cell | weights | gradients | state on device | host | disk | traffic | activations (MB) | peak (MB) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, measured in json.loads(RESULTS.read_text()).items():
        expected = predicted(name, measured["active"])
        closed = [
            "-" if name in PROBING and key in ("state", "traffic") else percent(expected[key], measured[key])
            for key in ("weights", "gradients", "state", "host", "disk", "traffic")
        ]
        sizes = [
            f"{expected[key] / 1e6:.2f} / {measured[key] / 1e6:.2f} ({percent(expected[key], measured[key])})"
            for key in ("activations", "peak")
        ]
        rows.append(f"| {name} | {' | '.join(closed)} | {' | '.join(sizes)} |")
    return "\n".join(rows)


def percent(expected: float, measured: float) -> str:
    """The deviation, and no minus sign before a zero."""
    from helpers.planned import deviation

    return f"{round(deviation(expected, measured), 3) + 0.0:+.1%}"


def examples() -> str:
    """Worked examples, in GB."""
    from grass_ds.plan.model_shape import ModelShape, read_config
    from grass_ds.plan.request import Request
    from grass_ds.plan.search import Plan, largest_gamma, largest_micro_batch
    from grass_ds.precision import DTYPES

    heads = ["model", "GPUs", "ZeRO", "weights", "gradients", "activations", "window", "gathered", "device", "host"]
    heads += ["fits", "largest gamma", "largest micro-batch"]
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in MODELS:
        model = ModelShape(read_config(name), DTYPES["bf16"])
        for ranks, size in MACHINES:
            request = Request(name, ranks, size * 10**9, **EXAMPLE)  # type: ignore[arg-type]
            made = Plan(model, request)
            found = made.prediction
            columns = ("weights", "gradients", "activations", "window", "gathered weights")
            parts = [f"{found.device[column] / 1e9:.2f}" for column in columns]
            parts += [f"{found.total / 1e9:.2f}", f"{ranks * found.host / 1e9:.1f}", "yes" if made.fits else "no"]
            parts += [
                str(number or "-") for number in (largest_gamma(model, request), largest_micro_batch(model, request))
            ]
            rows.append(f"| {name} | {ranks} x {size} GB | {made.stage} | {' | '.join(parts)} |")
    return "\n".join(rows)


def formats() -> str:
    """Host memory and traffic of the formats: Llama-2-7B, gamma 8, one rank."""
    from grass_ds.plan.model_shape import ModelShape, read_config
    from grass_ds.plan.request import FORMATS, Request
    from grass_ds.plan.search import Plan
    from grass_ds.precision import DTYPES

    model = ModelShape(read_config("llama-2-7b"), DTYPES["bf16"])
    plans = {form: Plan(model, Request("llama-2-7b", 1, 24 * 10**9, state_format=form)).prediction for form in FORMATS}
    whole = plans["fp32"].stepped
    rows = ["| `state_format` | host (GB) | state per step, one way (GB) | of fp32's |", "|---|---|---|---|"]
    for form, found in plans.items():
        moved = found.stepped
        rows.append(f"| `{form}` | {found.host / 1e9:.1f} | {moved / 1e9:.2f} | {moved / whole:.3f} |")
    return "\n".join(rows)


TABLES = {"validation": validation, "formats": formats, "examples": examples}


def page(text: str, *names: str) -> str:
    """The page with these of :data:`TABLES` new; default: all."""
    for name in names or TABLES:
        start, end = f"<!-- benchmark plan {name} -->", f"<!-- end of plan {name} -->"
        assert text.count(start) == text.count(end) == 1, name
        before, _, rest = text.partition(start)
        text = f"{before}{start}\n{TABLES[name]()}\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    if "--measure" in sys.argv:
        measure()
    PAGE.write_text(page(PAGE.read_text()))
