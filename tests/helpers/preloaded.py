# SPDX-License-Identifier: Apache-2.0
"""Importing this makes a process to fork ranks from: it does once what each of them would do again, as far as that starts no thread."""

import gc
import os

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # every engine imports it: a second
import torch
import transformers.models.llama.modeling_llama  # noqa: F401
from deepspeed.accelerator import get_accelerator

import grass_ds.entry
import grass_ds.trainer.callback  # noqa: F401

torch.set_num_threads(1)
get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)  # its build is locked by a file
threads = os.listdir("/proc/self/task")
assert len(threads) == 1, f"{len(threads)} threads; a fork would not have them"
gc.freeze()  # what was imported is no garbage, and a look at it takes a third of a second
