# SPDX-License-Identifier: Apache-2.0
"""Write ``docs/config.md`` from the models and field descriptions of ``grass_ds/config.py``: ``python docs/write_config.py``."""

import ast
import inspect
import itertools
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grass_ds.config import GrassConfig, OffloadConfig

PAGE = Path(__file__).resolve().parent / "config.md"

HEAD = """\
# The `"grass"` block

Generated from `grass_ds/config.py` by `python docs/write_config.py`; do not edit.

The block stands at the top level of the DeepSpeed config. Every key may be left out or `null`: its default then
applies. `"auto"` is possible for `offload.io`, and for `num_active_layers` beside `memory_budget`. An unknown key or a
value out of range is an error at start.

Defaults marked [ours] are this project's choice, because the values of the paper could not be read.
[Short runs of a small model](../benchmarks/STUDIES.md) show what other values change: little.

Ready configs are in `ds_configs/`: `quickstart.json`, `grass.json`, `zero1_grass.json`, `lisa.json`, `badam.json`,
`ows.json`, `misa.json`, `ist.json` and `full.json`; with partitioned weights `zero3_grass.json`,
`zero3_grass_nvme.json`, `zero3_lisa.json` and `zero3_full.json`.
"""

OFFLOAD = """\
## `"offload"` inside the block

These keys change memory and time, never a bit of the result. [offload.md](offload.md) explains the choices.
"""


def descriptions(model: type) -> dict[str, str]:
    """Field -> the string literal below it in the class body, as one line of Markdown."""
    body = ast.parse(inspect.getsource(model)).body[0].body  # type: ignore[attr-defined]
    return {
        field.target.id: " ".join(text.value.value.split()).replace("``", "`").replace("GRASS*", r"GRASS\*")
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def values(schema: Mapping[str, Any]) -> str:
    """The allowed values of a field, from its JSON schema."""
    if "anyOf" in schema:
        return " or ".join(map(values, schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(choice)}`" for choice in schema["enum"])
    if "examples" in schema:
        return ", ".join(f"`{json.dumps(choice)}`" for choice in schema["examples"]) + ", or a name"
    if schema["type"] == "array":
        return f"list of {values(schema['items'])}"
    if schema["type"] in ("boolean", "null"):
        return {"boolean": "`true`, `false`", "null": "`null`"}[schema["type"]]
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[key]}".replace(str(2**63), "2^63") for key, sign in signs.items() if key in schema]
    return f"{schema['type']} {', '.join(limits)}".strip()


def section(model: type[GrassConfig] | type[OffloadConfig]) -> str:
    """A table of all keys, then the full text of those that need more than one sentence."""
    texts, fields = descriptions(model), model.model_json_schema()["properties"]
    table, details = ["| key | values | default | meaning |", "|---|---|---|---|"], []
    for key, schema in fields.items():
        text = texts[key]
        if "$ref" in schema:
            table.append(f"| [`{key}`](#offload-inside-the-block) | object | `{{}}` | {text.rstrip('.')} |")
            continue
        ours = " [ours]" if "[ours]" in text else ""
        first, _, rest = text.removesuffix("[ours]").strip().partition(". ")
        name = f"[`{key}`](#{key})" if rest else f"`{key}`"
        table.append(
            f"| {name} | {values(schema)} | `{json.dumps(schema.get('default', {}))}` | {first.rstrip('.')}{ours} |"
        )
        if rest:
            paragraph = textwrap.fill(text, 119, break_long_words=False, break_on_hyphens=False)
            details.append(f"### `{key}`\n\n{paragraph}\n")
    return "\n".join([*table, "", *details])


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, section(GrassConfig), OFFLOAD, section(OffloadConfig)]).rstrip("\n") + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
