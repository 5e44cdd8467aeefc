# SPDX-License-Identifier: Apache-2.0
"""What to train and when: layer discovery, importance, samplers, schedule and the controller that joins them.

Pure Python and torch: nothing here knows DeepSpeed, transformers, the configuration file or any I/O.
"""
