# SPDX-License-Identifier: Apache-2.0
"""What a model card says of a layer-sampled run: method, steps per layer, config, versions."""

import json
import re
from pathlib import Path

from huggingface_hub import ModelCard

from grass_ds import versions
from grass_ds.config import GrassConfig
from grass_ds.core.durable_files import replace_file
from grass_ds.trainer.history import History

TAG = "grass"
BEGIN, END = "<!-- grass_ds -->", "<!-- end of grass_ds -->"
_SECTION = re.compile(rf"\n*{BEGIN}.*?{END}", flags=re.DOTALL)
_PACKAGES = ("grass_ds", "deepspeed", "torch", "transformers")


def describe_run(history: History, config: GrassConfig) -> str:
    """The section for a run with at least one step, in Markdown."""
    visits, steps = history.visits(), len(history.rows)
    probing = sum(row.phase == "probe" for row in history.rows)
    measured = f" after {probing} that only measured gradients" if probing else ""
    # Where the state was kept does not change the model; the path is the machine's own matter.
    block = config.model_dump(mode="json", exclude_unset=True, exclude={"offload": {"nvme_path"}})
    found = {name: versions.installed(name) for name in _PACKAGES}
    method = (
        f"Full-parameter fine-tuning by `grass_ds`, sampler `{history.sampler}`: at most {history.num_active_layers} of "
        f"{len(history.layers)} layers trained at a time, for {steps - probing} optimizer steps{measured}. What always "
        "trained besides: `always_active` below, where null means a language model's final norm."
    )
    rows = [f"| `{name}` | {count} |" for name, count in zip(history.layers, visits, strict=True)]
    return "\n".join(
        [
            "## Layer-sampled fine-tuning",
            "",
            method,
            "",
            "<details><summary>Training steps per layer</summary>",
            "",
            "| layer | steps |",
            "|---|---|",
            *rows,
            "",
            "</details>",
            "",
            'The `"grass"` block of the DeepSpeed config, without its defaults:',
            "",
            "```json",
            json.dumps({"always_active": config.always_active, **block}, indent=2),
            "```",
            "",
            "Versions: " + ", ".join(f"{name} {version}" for name, version in found.items() if version),
        ]
    )


def add_to_model_card(folder: Path, section: str) -> None:
    """Put the section into ``folder/README.md``, instead of an earlier one; made if there is none.

    Raises:
        ValueError, OSError: README.md cannot be read as a model card, or cannot be written.
    """
    path = folder / "README.md"
    card = (
        ModelCard.load(path)
        if path.exists()
        else ModelCard(f"---\nlibrary_name: transformers\n---\n# {folder.name}\n")
    )
    tags = card.data.get("tags") or []
    card.data["tags"] = [*(tag for tag in tags if tag != TAG), TAG]
    card.text = _SECTION.sub("", card.text).rstrip() + f"\n\n{BEGIN}\n{section}\n{END}\n"
    replace_file(path, str(card))
