"""Until the core is in this branch, the stand-in takes its place."""

import importlib
import importlib.util
import sys

if importlib.util.find_spec("kvstrata.config") is None:
    sys.modules["kvstrata.config"] = importlib.import_module("naive_config")
if importlib.util.find_spec("kvstrata.cache") is None:
    sys.modules["kvstrata.cache"] = importlib.import_module("naive_cache")
