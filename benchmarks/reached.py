# SPDX-License-Identifier: Apache-2.0
"""What README.md quotes of the quality suite: a table of the losses reached, and a paragraph per task."""

import textwrap
from collections.abc import Sequence
from typing import Any

from benchmarks import contest, standings
from benchmarks.methods import METHODS
from benchmarks.places import each, header, line, precision_unlike_bf16
from benchmarks.tasks import TASKS
from benchmarks.worth import BEST, DEFAULT, UNIFORM, agreement, brings

Row = dict[str, Any]


def reached_block(rows: Sequence[Row]) -> str:
    """Markdown; empty as long as no task has been compared."""
    tasks = {task: [row for row in rows if row["task"] == task] for task in TASKS}
    tasks = {task: mine for task, mine in tasks.items() if any(row["steps"] for row in standings.reported(mine))}
    if not tasks:
        return ""
    texts = [textwrap.fill(_paragraph(task, mine), 140, break_on_hyphens=False) for task, mine in tasks.items()]
    return "\n".join([*_table(tasks), "", "\n\n".join(texts), ""])


def _table(tasks: dict[str, list[Row]]) -> list[str]:
    """A line per method, a column per task."""
    lines = header("held-out loss, nats per answer token", *(f"`{task}`" for task in tasks))
    untrained = [[row for row in standings.reported(mine) if not row["steps"]] for mine in tasks.values()]
    found = {"(untrained)": untrained} | {
        METHODS[method].bare_label: [standings.trained(standings.reported(mine), method) for mine in tasks.values()]
        for method in contest.METHODS
    }
    for label, per_task in found.items():
        if any(per_task):
            losses = [standings.spread([row["test_loss"] for row in mine]) if mine else "" for mine in per_task]
            lines.append(line([label, *losses]))
    return lines


def _paragraph(task: str, rows: Sequence[Row]) -> str:
    """Conditions, how far grass and uniform are apart, and what a layer brings."""
    mine = [row for row in standings.reported(rows) if row["steps"]]
    redrawn, valued = standings.other_draws(rows), [row for row in rows if "worth" in row]
    one = mine[0]
    text = (
        f"`{task}`: {', '.join(TASKS[task].train)}; SmolLM2-135M-Instruct{precision_unlike_bf16(one)}, {one['steps']} steps of {one['micro_batch']} rows, "
        f"{len({row['seed'] for row in mine})} seeds (mean ± standard deviation), learning rates tuned per method, one {one['device'].upper()} rank, commit "
        f"{each([*mine, *redrawn, *valued], 'commit', ', ')}."
    )
    if pairs := standings.within_seeds(mine, "grass", "uniform", lambda row: row["test_loss"]):
        text += f" Within a seed, `grass` - `uniform`: {standings.mean_and_interval(pairs)}"
        if drawn := list(standings.redrawn_differences(redrawn).values()):
            text += (
                f"; with {len(drawn)} further pairs of draws on {len({row['seed'] for row in redrawn})} of these seeds, development loss: "
                f"{standings.mean_and_interval(drawn)}"
            )
        text += "."
    if len(valued) > 1:
        found = {name: less for name, (less, _) in brings(valued).items()}
        text += (
            f" One layer alone, trained for {valued[0]['worth']['steps']} steps from the untrained weights, lowers the development loss by "
            f"{found[UNIFORM]:.3f} if drawn uniformly, by {found[DEFAULT]:.3f} if drawn by its gradient at the default temperature, and by "
            f"{found[BEST]:.3f} if it is the one that was best with other batches; rank correlation of gradients with what layers bring: "
            f"{agreement(valued):.2f}."
        )
    return text
