# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: the wrapper's state, the files that hold it, and when they are complete."""
