# SPDX-License-Identifier: Apache-2.0
"""LLaMA-Factory's training: ``torchrun ... -m grass_ds.integrations.llama_factory train.yaml``.

Instead of ``llamafactory-cli train train.yaml``, which starts new processes, where nothing knows of this package.
"""

from llamafactory.train.tuner import run_exp

from grass_ds.entry import enable
from grass_ds.trainer.callback import GrassCallback

if __name__ == "__main__":
    enable()
    callback = GrassCallback()
    run_exp(callbacks=[callback])
    callback.add_to_model_card()  # again: run_exp ends with a card of its own
