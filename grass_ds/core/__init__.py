# SPDX-License-Identifier: Apache-2.0
"""What every room below needs: units of parameters, agreement of ranks, and the private names of DeepSpeed."""
