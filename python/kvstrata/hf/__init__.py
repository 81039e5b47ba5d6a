"""kvstrata in Hugging Face transformers: patch a model, make a KVCache, call generate.

The only package that imports transformers.
"""

from kvstrata.hf.cache import KVCache
from kvstrata.hf.patch import patch, patched, unpatch

__all__ = ["KVCache", "patch", "patched", "unpatch"]
