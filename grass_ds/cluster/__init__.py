# SPDX-License-Identifier: Apache-2.0
"""Ranks on machines: where each is, when the scheduler wants it to stop, and which fell silent."""
