# SPDX-License-Identifier: Apache-2.0
"""``engine.grass``: the state of a layer-sampled run."""

from typing import Any

from torch import nn

from grass_ds.checkpoint.state import INPUT_SQUARES
from grass_ds.checkpoint.writer import CheckpointWriter, SaveReport
from grass_ds.config import GrassConfig
from grass_ds.sampling.layers import ModelLayers
from grass_ds.zero.optimizer import GrassZeroOptimizer


class GrassHandle:
    """Read-only view of the sampler, of memory and of checkpoints, plus the sampler's state.

    Attributes:
        config: the ``"grass"`` block of the run.
        blocks: names of the decoder blocks.
        layers: the same, or the names of their weight matrices if the sampler draws these.
        writer: of the engine's checkpoints; the engine sets it.
    """

    writer: CheckpointWriter

    def __init__(self, config: GrassConfig, layers: ModelLayers, optimizer: GrassZeroOptimizer, module: nn.Module):
        self.config = config
        self.blocks, self.layers = layers.blocks, layers.names
        self._controller, self._optimizer, self._module = optimizer.controller, optimizer, module

    @property
    def phase(self) -> str:
        """``"probe"`` (measuring, no update) or ``"train"``."""
        return self._controller.phase.value

    @property
    def active_layers(self) -> tuple[int, ...]:
        """Indices of the layers that the next step measures (probe) or trains (train)."""
        return self._controller.active_layers

    @property
    def most_active(self) -> int:
        """The most layers that train at a time, probing aside."""
        return self._controller.most_active

    @property
    def expanded_layers(self) -> tuple[int, ...]:
        """Indices of the inactive layers that the next step moves by a sign step; none without ``expansion``."""
        return self._optimizer.expanded_layers

    @property
    def scores(self) -> tuple[float, ...] | None:
        """Per layer importance m_l, outlier ratio D_l in percent (``outlier``), or I, where more is less (``ist``).

        None before they are measured first, and for samplers without scores.
        """
        return self._controller.scores

    @property
    def probabilities(self) -> tuple[float, ...]:
        """p_l per layer of the next draw."""
        return self._controller.probabilities

    @property
    def visits(self) -> tuple[int, ...]:
        """Optimizer steps trained so far, per layer."""
        return self._controller.visits

    def memory(self, peak: bool = False) -> dict[str, dict[str, int]]:
        """Bytes on this rank: ``{"weights" | "gradients" | "optimizer_state": {"device" | "host" | "nvme": bytes}}``.

        Weights are the low-precision ones and buffers; in ZeRO-3 this rank's partitions and what is gathered now.
        ``"nvme"`` is there for optimizer state in files alone.

        Args:
            peak: of gradients and of optimizer state on the device the most since construction. Between steps
                gradients are gone.
        """
        store, reducer = self._optimizer.store, self._optimizer.reducer
        params = list(self._module.parameters())
        partitions = [param.ds_tensor for param in params if hasattr(param, "ds_tensor")]
        weights = {"device": 0, "host": 0}
        for tensor in (*params, *self._module.buffers(), *partitions):
            weights["device" if tensor.device.type == self._optimizer.device.type else "host"] += tensor.nbytes
        state = {"device": store.peak_device_bytes if peak else store.device_bytes, "host": store.host_bytes}
        if store.nvme_bytes:
            state["nvme"] = store.nvme_bytes
        gradients = {"device": reducer.peak_bytes if peak else reducer.nbytes, "host": 0}
        return {"weights": weights, "gradients": gradients, "optimizer_state": state}

    @property
    def checkpoint(self) -> SaveReport | None:
        """Size and time of the last checkpoint of this rank; None before the first."""
        return self.writer.report

    def wait_for_checkpoint(self) -> None:
        """See :meth:`grass_ds.GrassEngine.wait_for_checkpoint`: for code that has the optimizer only."""
        self.writer.wait()

    def state_dict(self) -> dict[str, Any]:
        """The sampler: phase, counters, scores, active set, generator, input norms. Plain Python and tensors."""
        return {**self._controller.state_dict(), INPUT_SQUARES: self._optimizer.outliers.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved sampler; takes effect at once. Call it between steps, on every rank."""
        self._controller.load_state_dict(state)
        self._optimizer.outliers.load_state_dict(state.get(INPUT_SQUARES))
        self._optimizer.activate()
