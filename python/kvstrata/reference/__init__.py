"""Every op in plain torch, straight from its formula, to contradict the native ones.

Imports torch and nothing of ours. Works on canonical elements: k, v [R, K, 16, D] of each row's page list. Written to be
read, not to be fast. Pass f64 tensors for a reference that rounding does not touch.
"""

from kvstrata.reference.attention import attend, logits, mass, merge, readable, visible_slots
from kvstrata.reference.choices import choose_states, fit, ranks
from kvstrata.reference.chunks import choose_chunks, chunk_order
from kvstrata.reference.groups import look_into, score_groups, summarize_groups
from kvstrata.reference.pages import (
    BITS,
    ELEMENT,
    SLOTS,
    append,
    compact,
    decode,
    dequantize,
    encode,
    group_size,
    pack,
    padded,
    quantize,
    rotate,
    round_up_bf16,
    splitmix64,
    unpack,
    widen,
)
from kvstrata.reference.parts import part_codes, part_facts, part_slots, split_blocks, summary_split
from kvstrata.reference.recall import (
    cluster,
    cluster_greedy,
    counts,
    estimate,
    held_mass,
    page_bounds,
    page_means,
    page_spreads,
    page_votes,
    query_codes,
    score_pages,
    select,
    similarities,
    summarize,
    summary_bounds,
    summary_codes,
    summary_parts,
    summary_values,
    zone,
)
from kvstrata.reference.scores import (
    accumulate,
    measure,
    pool,
    score_keys,
    score_max,
    score_window,
    shares,
    window_read,
)

__all__ = [
    "BITS", "ELEMENT", "SLOTS", "accumulate", "append", "attend", "choose_chunks", "choose_states", "chunk_order",
    "cluster", "cluster_greedy", "compact", "counts", "decode", "dequantize", "encode", "estimate", "fit", "group_size",
    "held_mass", "logits", "look_into", "mass", "measure", "merge", "pack", "padded", "page_bounds", "page_means",
    "page_spreads", "page_votes", "part_codes", "part_facts", "part_slots", "pool", "quantize", "query_codes", "ranks",
    "readable", "rotate", "round_up_bf16", "score_groups", "score_keys", "score_max", "score_pages", "score_window",
    "select", "shares", "similarities", "split_blocks", "splitmix64", "summarize", "summarize_groups", "summary_bounds",
    "summary_codes", "summary_parts", "summary_split", "summary_values", "unpack", "visible_slots", "widen",
    "window_read", "zone",
]  # fmt: skip
