"""Where the native core is not built, the dense stand-in of naive_cache.py takes its place."""

import importlib
import importlib.util
import sys

import pytest
import torch

if importlib.util.find_spec("kvstrata._C") is None:
    sys.modules["kvstrata.config"] = importlib.import_module("naive_config")
    sys.modules["kvstrata.cache"] = importlib.import_module("naive_cache")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
