"""kvstrata in Hugging Face transformers: patch a model, make a KVCache, call generate; or hold a conversation of any length.

The only package that imports transformers.
"""

from kvstrata.hf.cache import KVCache
from kvstrata.hf.chat_model import HfChatModel, chat_model
from kvstrata.hf.conversation import conversation
from kvstrata.hf.patch import patch, patched, unpatch

__all__ = ["HfChatModel", "KVCache", "chat_model", "conversation", "patch", "patched", "unpatch"]
