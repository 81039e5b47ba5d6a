"""kvstrata: a KV-cache engine for long-context LLM inference."""

__version__ = "0.1.0"
