# SPDX-License-Identifier: Apache-2.0
from hypothesis import settings

settings.register_profile("no deadline", deadline=None)  # a loaded machine is slow, not wrong
settings.load_profile("no deadline")
