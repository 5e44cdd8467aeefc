# SPDX-License-Identifier: Apache-2.0
"""All suites, in the order of RESULTS.md. The rows of one are in ``rows/<name>.jsonl``."""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from benchmarks.case import Case, Request, Row
from benchmarks.checkpoint import suite as checkpoint
from benchmarks.checkpoint import tables as checkpoint_tables
from benchmarks.compute import suite as compute
from benchmarks.compute import tables as compute_tables
from benchmarks.cpu import suite as cpu
from benchmarks.cpu import tables as cpu_tables
from benchmarks.epoch import suite as epoch
from benchmarks.epoch import tables as epoch_tables
from benchmarks.formats import suite as formats
from benchmarks.formats import tables as formats_tables
from benchmarks.frontier import suite as frontier
from benchmarks.frontier import tables as frontier_tables
from benchmarks.gpu import suite as gpu
from benchmarks.gpu import tables as gpu_tables
from benchmarks.levers import suite as levers
from benchmarks.levers import tables as levers_tables
from benchmarks.offload import suite as offload
from benchmarks.offload import tables as offload_tables
from benchmarks.quality import suite as quality
from benchmarks.quality import tables as quality_tables
from benchmarks.samplers import suite as samplers
from benchmarks.samplers import tables as samplers_tables

# glibc keeps freed memory, as the allocator of a GPU does. Otherwise large tensors go back to the operating system, and
# page faults take up to a third of a step.
KEEPS_MEMORY = MappingProxyType(
    {
        "GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=34359738368"
        ":glibc.malloc.top_pad=268435456:glibc.malloc.hugetlb=1"
    }
)


class Suite(NamedTuple):
    """Add a suite by writing both functions and naming it in :data:`SUITES`.

    Attributes:
        cases: the cases that can run given the rows that are there, in order; ``run.py`` skips those that have a row,
            and asks again until none is left.
        tables: rows -> blocks of Markdown: headings, conditions, tables of ``report.table``.
        dtype: the only precision in which it says something; None: any.
        environment: variables of its ranks, unless they are set.
    """

    cases: Callable[[Request], Iterable[Case]]
    tables: Callable[[list[Row]], list[str]]
    dtype: str | None = None
    environment: Mapping[str, str] = MappingProxyType({})


SUITES = {
    "cpu": Suite(cpu.cases, cpu_tables.tables),
    "compute": Suite(compute.cases, compute_tables.tables, environment=KEEPS_MEMORY),
    "quality": Suite(quality.cases, quality_tables.tables),
    "frontier": Suite(frontier.cases, frontier_tables.tables),
    "samplers": Suite(samplers.cases, samplers_tables.tables),
    "levers": Suite(levers.cases, levers_tables.tables),
    "epoch": Suite(epoch.cases, epoch_tables.tables, environment=KEEPS_MEMORY),
    "offload": Suite(offload.cases, offload_tables.tables),
    "formats": Suite(formats.cases, formats_tables.tables, formats.DTYPE),
    "checkpoint": Suite(checkpoint.cases, checkpoint_tables.tables),
    "gpu": Suite(gpu.cases, gpu_tables.tables),
}
