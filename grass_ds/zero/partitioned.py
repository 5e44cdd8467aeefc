# SPDX-License-Identifier: Apache-2.0
"""``deepspeed.utils.safe_*`` in ZeRO-3: full tensors as in the other stages, and this rank's partitions (``safe_get_local_*``).

DeepSpeed's functions ask ``param._z3_optimizer``, with the parameter as an argument. The local functions are collective only when state
lies in files, which can fail on one rank alone.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from grass_ds.core.units import PartitionedUnit
from grass_ds.zero.fragments import ParamFragment

Update = Callable[[torch.Tensor, nn.Parameter], torch.Tensor]


class Partition:
    """One parameter's partition on this rank, padding included."""

    def __init__(self, fragment: ParamFragment):
        assert isinstance(fragment.unit, PartitionedUnit)
        self.fragment, self._unit = fragment, fragment.unit
        self._start, self._numel = fragment.unit.offsets[fragment.slot], fragment.unit.parts[fragment.slot]

    def get(self, shard: torch.Tensor) -> torch.Tensor:
        """A copy of the partition within a tensor of the unit's shard: float32, [part], on the device of the model."""
        return self._of(shard).to(self._unit.device, torch.float32, copy=True)

    def put(self, shard: torch.Tensor, value: torch.Tensor) -> None:
        """Overwrite the partition within a tensor of the unit's shard.

        Raises:
            ValueError: ``value`` does not have as many elements.
        """
        if value.numel() != self._numel:
            raise ValueError(f"{self._unit.name}: the partition has {self._numel} elements, the value {value.numel()}")
        self._of(shard).copy_(value.detach().reshape(-1))

    def _of(self, shard: torch.Tensor) -> torch.Tensor:
        return shard.detach().narrow(0, self._start, self._numel)


class PartitionedAccess:
    """What ``param._z3_optimizer`` must answer; None for parameters that the user froze, as in DeepSpeed."""

    def __init__(self) -> None:
        self._partitions: dict[nn.Parameter, Partition] = {}

    def add(self, param: nn.Parameter, partition: Partition) -> None:
        self._partitions[param] = partition

    # ---- full tensors ---------------------------------------------------------------------------------------------------

    def get_full_hp_param(self, param: nn.Parameter, optim_state_key: str | None = None) -> torch.Tensor | None:
        found = self._partitions.get(param)
        return None if found is None else found.fragment.full_state(optim_state_key)

    def set_full_hp_param(self, value: torch.Tensor, param: nn.Parameter, optim_state_key: str | None = None) -> None:
        if param in self._partitions:
            self._partitions[param].fragment.set_state(value, optim_state_key)

    def get_fp32_grad_for_param(self, param: nn.Parameter) -> torch.Tensor | None:
        found = self._partitions.get(param)
        return None if found is None else found.fragment.full_gradient()

    def set_fp32_grad_for_param(self, value: torch.Tensor, param: nn.Parameter) -> None:
        if param in self._partitions:
            self._partitions[param].fragment.set_gradient(value)

    def update_fp32_grad_for_param_vectorized(self, update_func: Update, param_list: Sequence[nn.Parameter]) -> None:
        for param in param_list:
            gradient = self.get_fp32_grad_for_param(param)
            if gradient is not None:
                self.set_fp32_grad_for_param(update_func(gradient, param), param)

    # ---- this rank's partition ------------------------------------------------------------------------------------------

    def get_local_fp32_param(self, param: nn.Parameter, optim_state_key: str | None = None) -> torch.Tensor | None:
        found = self._partitions.get(param)
        return None if found is None else found.get(found.fragment.shard(optim_state_key))

    def set_local_hp_param(self, value: torch.Tensor, param: nn.Parameter, optim_state_key: str | None = None) -> None:
        found = self._partitions.get(param)
        if found is not None:
            found.fragment.change(optim_state_key, lambda shard: found.put(shard, value))

    def get_local_fp32_grad_for_param(self, param: nn.Parameter) -> torch.Tensor | None:
        found = self._partitions.get(param)
        shard = None if found is None else found.fragment.gradient_shard()
        return None if found is None or shard is None else found.get(shard)

    def set_local_grad_for_param(self, value: torch.Tensor, param: nn.Parameter) -> None:
        found = self._partitions.get(param)
        if found is not None:
            found.put(found.fragment.writable_gradient(), value)

    def get_hp_param_device(self, param: nn.Parameter, optim_state_key: str | None = None) -> torch.device | None:
        found = self._partitions.get(param)
        return None if found is None else found.fragment.shard(optim_state_key).device
