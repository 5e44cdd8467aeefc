# SPDX-License-Identifier: Apache-2.0
"""Optimizer state off the device: chunks, copies, tiers."""
