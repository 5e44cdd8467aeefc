# SPDX-License-Identifier: Apache-2.0
"""A plugin file of ms-swift 4: ``--external_plugins <path of this file> --callbacks grass``."""

from typing import Any

from swift.callbacks import callbacks_map

from grass_ds.entry import enable
from grass_ds.trainer.callback import GrassCallback


def make_callback(args: Any, trainer: Any) -> GrassCallback:
    """Called by ms-swift while it builds its Trainer."""
    return GrassCallback()


enable()
callbacks_map["grass"] = make_callback
