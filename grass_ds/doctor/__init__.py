# SPDX-License-Identifier: Apache-2.0
"""``python -m grass_ds doctor``: would training start on this machine, or on these, and if not, why.

Every check is a generator of findings. A check imports what it looks at only when it runs: where torch or DeepSpeed
does not load, the report says so. Conflicts between packages are left to ``pip check``, the requirements of
DeepSpeed's ops to ``ds_report``.
"""
