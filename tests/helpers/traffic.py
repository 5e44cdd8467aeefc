# SPDX-License-Identifier: Apache-2.0
"""What crosses ranks: collectives as torch dispatches them, and which weights ZeRO-3 gathers. Run inside a rank."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.live import tensors_in


class Collectives(TorchDispatchMode):
    """Every collective that torch dispatches while this is on: (operator, bytes of its largest tensor)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.calls.append(
                (func._schema.name.removeprefix("c10d::").strip("_"), max(t.nbytes for t in tensors_in(args)))
            )
        return func(*args, **(kwargs or {}))

    def bytes_of(self, operator: str) -> int:
        """Bytes of all calls of one operator."""
        return sum(nbytes for name, nbytes in self.calls if name == operator)


class Gathers:
    """Which parameters ZeRO-3 gathers and when; which modules found theirs on the way already.

    Make it after the engine. DeepSpeed gathers by calling a function that hangs on one of the parameters: all of them
    are wrapped.

    Attributes:
        phase: what the caller says is going on.
        log: (phase, names gathered in one call).
        ahead: names whose gather had begun before their module ran forward, since :meth:`clear`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.phase = ""
        self.log: list[tuple[str, tuple[str, ...]]] = []
        self.ahead: set[str] = set()
        self._name = {id(param): name for name, param in model.named_parameters()}
        for param in model.parameters():
            param.all_gather_coalesced = self._logged(param.all_gather_coalesced)
            param.all_gather = self._logged(param.all_gather, default=[param])
        for module in model.modules():
            if module._parameters:
                module.register_forward_pre_hook(self._log_ahead, prepend=True)

    def clear(self) -> None:
        self.log.clear()
        self.ahead.clear()

    def names(self, *phases: str) -> list[str]:
        """Parameters gathered in these phases, sorted, each as often as it was."""
        return sorted(name for phase, names in self.log if phase in phases for name in names)

    def _logged(self, gather: Callable[..., Any], default: Any = ()) -> Callable[..., Any]:
        def logged(params: Any = None, *args: Any, **kwargs: Any) -> Any:
            wanted = kwargs.get("param_list", params) or default
            missing = [param for param in wanted if param.ds_status.name == "NOT_AVAILABLE"]
            if missing:
                self.log.append((self.phase, tuple(self._name[id(param)] for param in missing)))
            return gather(*(() if params is None else (params,)), *args, **kwargs)

        return logged

    def _log_ahead(self, module: nn.Module, *_: Any) -> None:
        for param in module._parameters.values():
            if param is not None and param.ds_status.name != "NOT_AVAILABLE":
                self.ahead.add(self._name[id(param)])
