# SPDX-License-Identifier: Apache-2.0
"""Other front-ends' entry points. Each module imports its front-end, and nothing imports the modules."""
