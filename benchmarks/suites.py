# SPDX-License-Identifier: Apache-2.0
"""All suites, in the order of RESULTS.md. The rows of one are in ``rows/<name>.jsonl``."""

from benchmarks.checkpoint import suite as checkpoint
from benchmarks.checkpoint import tables as checkpoint_tables
from benchmarks.cpu import suite as cpu
from benchmarks.cpu import tables as cpu_tables
from benchmarks.gpu import suite as gpu
from benchmarks.gpu import tables as gpu_tables
from benchmarks.offload import suite as offload
from benchmarks.offload import tables as offload_tables
from benchmarks.quality import plots as quality_plots
from benchmarks.quality import suite as quality
from benchmarks.quality import tables as quality_tables
from benchmarks.suite import Suite

SUITES = {
    "cpu": Suite(cases=cpu.cases, tables=cpu_tables.tables, needs_disk=True),
    "quality": Suite(cases=quality.cases, tables=quality_tables.tables, plots=quality_plots.draw),
    "offload": Suite(cases=offload.cases, tables=offload_tables.tables, needs_disk=True),
    "checkpoint": Suite(cases=checkpoint.cases, tables=checkpoint_tables.tables, needs_disk=True),
    "gpu": Suite(cases=gpu.cases, tables=gpu_tables.tables),
}
