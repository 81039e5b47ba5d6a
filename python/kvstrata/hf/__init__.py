"""kvstrata in Hugging Face transformers: patch a model, make a KVCache, call generate; or a chat_model for conversations.

The only package that imports transformers.
"""

from kvstrata.hf.cache import KVCache
from kvstrata.hf.chat_model import HfChatModel, chat_model
from kvstrata.hf.patch import patch, patched, unpatch

__all__ = ["HfChatModel", "KVCache", "chat_model", "patch", "patched", "unpatch"]
