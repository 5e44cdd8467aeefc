# SPDX-License-Identifier: Apache-2.0
"""``python -m grass_ds doctor``: would training start on this machine, or on these, and if not, why.

Every check is a function that yields findings; :mod:`grass_ds.doctor.run` calls them. A check imports what it looks at only when it runs,
so that a machine on which torch or DeepSpeed does not load is told so.
"""
