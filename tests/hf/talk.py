"""A small tokenizer, one token per byte but for marks and a few merges, and chat templates of several kinds."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

MARKS = ("<s>", "<|start|>", "<|end|>")
MERGES = [("t", "h"), ("th", "e"), (".", "Ċ"), ("Ċ", "Ċ")]
"""Ċ is the end of a line."""

CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TRIMS = (
    "<s>{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
PRESET = (
    "{% if messages[0].role != 'system' %}<|start|>system\nBe kind.<|end|>\n{% endif %}" + CHATML
)  # a system text where none is given
FOLDS = (
    "<s>{% if messages[0].role == 'system' %}{% set head = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set head = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "<|start|>{{ 'model' if m.role == 'assistant' else 'user' }}\n{% if loop.first %}{{ head }}{% endif %}"
    "{{ m.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>model\n{% endif %}"
)  # the system text is part of the first user's turn, and the roles alternate
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
THINKS = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n</think>\n"
    "{% endif %}{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)  # the last answer is written otherwise
LATE_SYSTEM = (
    "{% set sys = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}<|start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'user' %}{{ sys }}{% endif %}{{ m.content }}<|end|>\n{% endfor %}"
)  # the system text goes with the last question
COUNTS = "{% for m in messages %}<|start|>{{ loop.index }} {{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
MELTS = "{% for m in messages %}{{ '\\n' + m.role }}: {{ m.content + '\\n' }}{% endfor %}"  # the tokenizer joins ends of lines
TWICE = "{% for m in messages %}<|start|>{{ m.content }} {{ m.content }}<|end|>{% endfor %}"


def tokenizer(template=None):
    """Fast, with "<s>" as begin and "<|end|>" as end of text; it puts "<s>" before texts where there is no template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(a + b for a, b in MERGES)]
    core = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=MERGES))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<|end|>")
    found.add_special_tokens({"additional_special_tokens": list(MARKS)})
    found.chat_template = template
    if template is None:
        from tokenizers.processors import TemplateProcessing

        found.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", found.bos_token_id)]
        )
    return found
