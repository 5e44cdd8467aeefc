# SPDX-License-Identifier: Apache-2.0
"""``python -m grass_ds compare``: finished runs side by side, read from the files in their folders.

Only files are read: no torch, no transformers. Figures need matplotlib.
"""
