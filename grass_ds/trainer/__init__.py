# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face Trainer: the callback, its checkpoints, and what a run writes about itself."""
