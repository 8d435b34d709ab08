"""Imports of torch and Megatron for the commands that run something, without their warnings about absent extras."""

from __future__ import annotations

import importlib
import logging
import os
import warnings


def import_runtime() -> None:
    """Import what forked ranks will need, once, and make it run on the CPU, also where there is a GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex|transformer-engine|full scope).*")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    importlib.import_module("megatron_mosaic.any2any.pretrain")
    importlib.import_module("megatron_mosaic.runtime.train")
    importlib.import_module("megatron_mosaic.parallel_state_ext.rebound.cpu").install()
