# SPDX-License-Identifier: Apache-2.0
"""A plugin of axolotl. In its YAML: ``plugins: [grass_ds.integrations.axolotl.GrassPlugin]``."""

from typing import Any

from axolotl.integrations.base import BasePlugin

from grass_ds.entry import enable
from grass_ds.trainer.callback import attach


class GrassPlugin(BasePlugin):
    """Lets the ``"grass"`` block of axolotl's ``deepspeed:`` file take effect, and reports through its Trainer."""

    def register(self, cfg: Any) -> None:
        enable()

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        self._callback = attach(trainer)  # which adds it itself, at the right place
        return []

    def post_train_unload(self, cfg: Any) -> None:
        self._callback.add_to_model_card()  # again: axolotl writes a card of its own after training
