# SPDX-License-Identifier: Apache-2.0
"""``python -m grass_ds plan``: what a run needs on device, host and disk, before there is a machine to run it on.

Weights, gradients and optimizer state are those of the library's own units and layouts, built on the meta device.
Activations are measured there, too: on the model's own graph, of which no tensor has memory.
"""
