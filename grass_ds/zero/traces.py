# SPDX-License-Identifier: Apache-2.0
"""The traces of modules by which ZeRO-3 gathers weights ahead of their use.

[Note: Trace] DeepSpeed records the order in which modules run, and gathers weights by that trace. Inactive layers do
not change the order, with one exception: where the embeddings do not train, backward stops at the lowest active layer.
With a trace that is too short DeepSpeed starts over in the middle of backward; with one that is too long it gathers
weights that nobody uses. So each lowest active layer has its own coordinator with its own trace. It is swapped in at
the start of the first training forward with that layer: an evaluation before has no backward, and would be recorded.
"""

import torch

from grass_ds.core import deepspeed_compat


class Traces:
    """One of DeepSpeed's coordinators for each lowest active layer. See [Note: Trace].

    Args:
        offload: DeepSpeed's hooks on the model, which gather weights by the present coordinator.

    Attributes:
        coordinators: lowest layer that backward reaches -> coordinator with the trace of such passes.
    """

    def __init__(self, offload: deepspeed_compat.DeepSpeedZeRoOffload):
        self.coordinators = {0: offload.get_param_coordinator()}
        self._offload = offload
        self._present = 0
        self._recorded: set[int] = set()  # layers whose trace DeepSpeed may have used already

    def begin_forward(self, lowest_layer: int) -> None:
        """Switch to the trace of passes down to ``lowest_layer``, unless this forward is an evaluation."""
        # Not module.training: models come from ``from_pretrained`` in evaluation mode, in which they can train, too.
        if lowest_layer != self._present and torch.is_grad_enabled():
            if lowest_layer not in self.coordinators:
                self.coordinators[lowest_layer] = deepspeed_compat.without_trace(self._offload.param_coordinator)
            self._offload.param_coordinator = self.coordinators[lowest_layer]
            self._present = lowest_layer
        if not self.coordinators[self._present].is_invalid_trace():
            self._recorded.add(self._present)  # complete once this pass begins, even an evaluation

    def end_backward(self) -> None:
        """Release what DeepSpeed has not, and clear its cached decisions if it starts a new trace."""
        # Backward does not reach the input of the lowest active layer, so DeepSpeed does not see that layer's end.
        self._offload.release_backward_leftovers()
        complete = self.coordinators[self._present].is_complete_trace()
        if self._present in self._recorded and not complete:  # modules ran in another order
            self._recorded.remove(self._present)
            deepspeed_compat.clear_release_cache()
