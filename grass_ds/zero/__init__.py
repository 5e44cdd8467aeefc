# SPDX-License-Identifier: Apache-2.0
"""The engine and its ZeRO optimizer wrappers: gradients, steps and the weights of the active layers."""
