# SPDX-License-Identifier: Apache-2.0
"""``python -m grass_ds doctor``: would training start on this machine, or on these, and if not, why.

Every check is a generator of findings. Conflicts between packages are left to ``pip check``, the requirements of
DeepSpeed's ops to ``ds_report``.
"""
