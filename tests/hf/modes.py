"""The ways to generate. Each mode takes a model and a maker of caches and returns what was generated, as lists of ids.

The same mode runs twice: on the unpatched model with DynamicCache, on the patched one with KVCache.
"""

from __future__ import annotations

import copy

import torch
import transformers
from tiny import VOCAB
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from kvstrata.hf import KVCache

NEW = 36  # with 13 prompt tokens the lengths cross 16, 32 and 48
RELEASE = tuple(int(x) for x in transformers.__version__.split(".")[:2])


def stock(model):
    """A DynamicCache as generate would make it."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def ours(model):
    """A KVCache that drops nothing."""
    return KVCache.for_model(model)


def prompt(rows=1, length=13, seed=3):
    """Random ids [rows, length], none of them the pad or an image token."""
    return torch.randint(1, VOCAB - 10, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(length=13):
    """Four rows of 13, 5, 1 and 9 real tokens, padded on the left, and their mask."""
    ids, mask = prompt(4, length), torch.ones(4, length, dtype=torch.long)
    for row, real in enumerate((length, 5, 1, 9)):
        ids[row, : length - real], mask[row, : length - real] = 0, 0
    return ids, mask


def there(model, x):
    """A tensor where the model is, or of an offloaded one on the CPU; anything else as it is."""
    return x.to(model.device) if isinstance(x, torch.Tensor) and model.device.type != "meta" else x


def run(model, cache, ids=None, new=NEW, **kwargs):
    """model.generate, greedy unless told otherwise; ids as nested lists."""
    kwargs = {"do_sample": False, **{name: there(model, x) for name, x in kwargs.items()}}
    out = model.generate(there(model, ids), max_new_tokens=new, past_key_values=cache, **kwargs)
    return out.tolist()


def greedy(model, make):
    return run(model, make(model), prompt())


def greedy_mask(model, make):
    ids = prompt()
    return run(model, make(model), ids, attention_mask=torch.ones_like(ids))


def left_padded(model, make):
    ids, mask = padded()
    return run(model, make(model), ids, attention_mask=mask)


def beams(model, make):
    return run(model, make(model), prompt(), new=24, num_beams=4)


def beams_return(model, make):
    ids, mask = padded()
    return run(model, make(model), ids, new=12, attention_mask=mask, num_beams=4, num_return_sequences=2)


def sample(model, make):
    torch.manual_seed(11)
    return run(model, make(model), prompt(), do_sample=True, num_return_sequences=4, top_k=0)


def chunks(model, make):
    ids = prompt(length=22)
    return [run(model, make(model), ids, new=12, prefill_chunk_size=size) for size in (7, 10)]


def chunks_padded(model, make):
    ids, mask = padded(length=22)
    return [run(model, make(model), ids, new=12, attention_mask=mask, prefill_chunk_size=size) for size in (7, 10)]


def lookup(model, make):
    ids = torch.cat([prompt(length=7)] * 3, dim=1)
    return run(model, make(model), ids, prompt_lookup_num_tokens=4)


def noisy(model):
    """A copy with 2 % noise on every weight."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.02 * weight.std(unbiased=False) * there(model, torch.randn(weight.shape, generator=generator))
    other.generation_config.update(
        num_assistant_tokens=4, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    return other


def assisted(model, make):
    return run(model, make(model), prompt(), assistant_model=model.assistant)


def two_turns_full(model, make):
    cache, ids = make(model), prompt()
    first = torch.tensor(run(model, cache, ids, new=8))
    assert cache.get_seq_length() == 20  # the last token of a turn is not cached yet
    again = torch.cat([first, prompt(length=5, seed=9)], dim=1)
    return run(model, cache, again, attention_mask=torch.ones_like(again))


def two_turns_new(model, make):
    cache, ids = make(model), prompt()
    first = torch.tensor(run(model, cache, ids, new=8))
    again = torch.cat([first, prompt(length=5, seed=9)], dim=1)
    return run(model, cache, again[:, cache.get_seq_length() :], attention_mask=torch.ones_like(again))


def two_turns_chunked(model, make):
    cache, ids = make(model), prompt()
    first = torch.tensor(run(model, cache, ids, new=8))
    again = torch.cat([first, prompt(length=9, seed=9)], dim=1)
    return run(model, cache, again, attention_mask=torch.ones_like(again), prefill_chunk_size=4)


def embeddings(model, make):
    with torch.no_grad():
        embeds = model.get_input_embeddings()(there(model, prompt()))
    return run(model, make(model), inputs_embeds=embeds)


class Heard(BaseStreamer):
    """Collects what is streamed."""

    def __init__(self):
        self.ids = []

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        self.ids.append(None)


def streamer(model, make):
    heard = Heard()
    return [run(model, make(model), prompt(), streamer=heard), heard.ids]


def deepcopied(model, make):
    ids, cache = prompt(length=20), make(model)
    with torch.no_grad():
        model(there(model, ids), past_key_values=cache, use_cache=True)
    out = []
    for seed in (21, 22):
        again = torch.cat([ids, prompt(length=4, seed=seed)], dim=1)
        out.append(run(model, copy.deepcopy(cache), again, new=20, attention_mask=torch.ones_like(again)))
    return [*out, cache.get_seq_length()]


def repeated(model, make):
    ids, cache = prompt(length=17), make(model)
    with torch.no_grad():
        model(there(model, ids[:, :-1]), past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(3)
    again = ids.repeat(3, 1)
    return run(model, cache, again, attention_mask=torch.ones_like(again), do_sample=True, top_k=0)


MODES = (
    greedy,
    greedy_mask,
    left_padded,
    beams,
    beams_return,
    sample,
    chunks,
    chunks_padded,
    lookup,
    assisted,
    two_turns_full,
    two_turns_new,
    two_turns_chunked,
    embeddings,
    streamer,
    deepcopied,
    repeated,
)
