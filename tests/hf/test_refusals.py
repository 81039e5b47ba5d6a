"""What cannot work is refused with its reason, and nothing has changed."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from modes import ours, padded, prompt, run
from tiny import build
from transformers import DynamicCache

from kvstrata.config import BudgetExceeded, Unsupported
from kvstrata.hf import KVCache, compat, patch, unpatch


def forward(model, cache, ids, mask=None, **kwargs):
    with torch.no_grad():
        return model(ids, attention_mask=mask, past_key_values=cache, **kwargs).logits


@pytest.fixture
def model():
    return patch(build("llama"))


@pytest.fixture
def filled(model):
    """A cache of 13 columns, four left-padded rows, and the mask so far."""
    cache = ours(model)
    ids, mask = padded()
    forward(model, cache, ids, mask)
    return cache, mask


def refused(model, cache, match, ids, mask=None, error=ValueError, **kwargs):
    before = (cache.columns, [cache.logical_length(i) for i in range(len(cache.sequences))], cache.report().stored)
    with pytest.raises(error, match=match):
        forward(model, cache, ids, mask, **kwargs)
    assert before == (
        cache.columns,
        [cache.logical_length(i) for i in range(len(cache.sequences))],
        cache.report().stored,
    )


# --- at construction ---------------------------------------------------------------------------------------------------


def test_for_model_before_patch():
    with pytest.raises(RuntimeError, match=r"model is not patched: call kvstrata\.patch\(model\)"):
        KVCache.for_model(build("llama"))


def test_for_model_after_the_weights_changed(model):
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"expected \(torch\.float32.*got \(torch\.bfloat16"):
        KVCache.for_model(model)
    cache = KVCache.for_model(patch(model))
    assert cache.cache.shape.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"budget": "25%", "keep_ratio": 0.5}, "budget and keep_ratio say the same thing"),
        ({"keep_ratio": 0.5, "compression_ratio": 0.5}, "compression_ratio and keep_ratio"),
        ({"compression_ratio": 1.0}, "compression_ratio: expected a share"),
        ({"keep_ratio": 1.5}, "keep_ratio: expected a share"),
        ({"budget": 0.25}, "budget"),
        ({"budget": True}, "budget"),
        ({"policy": "nonsense"}, "nonsense"),
    ],
)
def test_arguments_of_for_model(model, arguments, match):
    with pytest.raises(ValueError, match=match):
        KVCache.for_model(model, **arguments)


# --- at a forward ------------------------------------------------------------------------------------------------------


def test_no_tokens(model, filled):
    cache, mask = filled
    refused(model, cache, r"no tokens \(T = 0\) and 13 columns", torch.zeros(4, 0, dtype=torch.long), mask)


def test_mask_of_the_wrong_shape(model, filled):
    cache, mask = filled
    refused(model, cache, r"\[B, cached columns \+ T\] = \[4, 15\], got \[4, 13\]", prompt(4, 2), mask)


def test_mask_of_stored_columns_changed(model, filled):
    cache, mask = filled
    changed = torch.cat([torch.ones_like(mask), torch.ones(4, 1, dtype=torch.long)], 1)
    refused(
        model,
        cache,
        r"cached columns changed: expected.*\[13, 5, 1, 9\], got \[13, 13, 13, 13\]",
        prompt(4, 1),
        changed,
    )


def test_no_mask_after_padding(model, filled):
    refused(model, filled[0], "hold padding: attention_mask .* is required", prompt(4, 1))


def test_positions_that_start_anew(model):
    cache = ours(model)
    forward(model, cache, prompt())
    positions = torch.arange(4)[None]
    refused(
        model,
        cache,
        r"position_ids must start at the 13 cached columns.*got \[0\]",
        prompt(1, 4),
        position_ids=positions,
    )


def test_another_batch_size(model, filled):
    refused(model, filled[0], "batch size: expected 4, the sequences in the cache, got 2", prompt(2, 1))


@pytest.mark.parametrize("mask", [torch.zeros(4, 1, 1, 14), {"full_attention": torch.zeros(4, 1, 1, 14)}])
def test_ready_made_masks(model, filled, mask):
    refused(model, filled[0], r"ready-made .*mask \[4, 1, 1, 14\]; pass the 2-D mask", prompt(4, 1), mask, Unsupported)


def test_output_attentions(model, filled):
    cache, mask = filled
    longer = torch.cat([mask, torch.ones(4, 1, dtype=torch.long)], 1)
    refused(model, cache, "output_attentions=True", prompt(4, 1), longer, Unsupported, output_attentions=True)


def test_training_mode_with_our_cache(model):
    cache = ours(model)
    model.train()
    refused(model, cache, "training mode", prompt(), error=Unsupported)
    model.eval()
    forward(model, cache, prompt())


def test_gradient_checkpointing_with_our_cache(model):
    cache = ours(model)
    model.gradient_checkpointing_enable()
    model.train()
    refused(model, cache, "attention ran without an update of the cache|training mode", prompt(), error=Unsupported)


def test_more_than_a_causal_mask():
    model = patch(build("gemma3_mm"))
    cache = ours(model)
    ids = prompt()
    ids[0, 3:7] = 90
    kinds = torch.zeros_like(ids)
    kinds[0, 3:7] = 1
    pixels = torch.rand(1, 3, 28, 28)
    with pytest.raises(Unsupported, match="more than a causal, windowed and padded mask"):
        forward(model, cache, ids, torch.ones_like(ids), pixel_values=pixels, token_type_ids=kinds)
    assert cache.columns == 0
    forward(model, cache, prompt())


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"position_bias": torch.zeros(1)}, Unsupported, r"tensor argument position_bias \[1\]"),
        ({"encoder_hidden_states": torch.zeros(1, 2)}, Unsupported, "encoder_hidden_states"),
        ({"dropout": 0.1}, Unsupported, "dropout = 0.1"),
        ({"output_attentions": True}, Unsupported, "output_attentions"),
        ({"is_causal": False}, Unsupported, "is_causal=False"),
        ({"sliding_window": 5}, ValueError, "sliding_window: expected 8, as the cache was built, got 5"),
        ({"attention_mask": torch.zeros(1, 1, 2, 2)}, Unsupported, r"its own mask or bias \[1, 1, 2, 2\]"),
    ],
)
def test_arguments_of_the_attention_call(arguments, error, match):
    from kvstrata.hf.step import audit_arguments

    module = build("llama").model.layers[0].self_attn
    fine = {"position_ids": torch.zeros(1, 2), "s_aux": torch.zeros(4), "is_causal": True, "sliding_window": 8}
    audit_arguments(module, None, {**fine, "dropout": 0.0, "anything": "else"}, 8)
    kwargs = {**fine, **arguments}
    with pytest.raises(error, match=match):
        audit_arguments(module, kwargs.pop("attention_mask", None), kwargs, 8)


def test_gradients_are_detached_with_one_warning(model, caplog):
    compat.warn_once.cache_clear()
    for _ in range(2):
        model(prompt(), past_key_values=ours(model))
    assert [r.getMessage() for r in caplog.records if "gradients" in r.getMessage()] == [
        "gradients do not flow through a KVCache: the attention output is detached"
    ]


def test_dtype_changed_after_for_model(model):
    cache = ours(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        refused(model, cache, r"values: expected torch\.float32 on cpu.*got torch\.bfloat16", prompt())
    patch(model.to(torch.bfloat16))
    refused(
        model, cache, r"made for another model; layer 0 dtype: expected torch\.float32, got torch\.bfloat16", prompt()
    )


def test_a_cache_of_another_model(model):
    refused(patch(build("qwen3")), ours(model), "model class: expected LlamaModel, got Qwen3Model", prompt())
    refused(patch(build("llama", 64)), ours(model), "layer 0 head_dim: expected 16, got 64", prompt())
    twin = patch(build("llama"))
    forward(twin, ours(model), prompt())


def test_an_unpatched_model_cannot_update(model):
    cache = ours(model)
    forward(model, cache, prompt())
    unpatch(model)
    with pytest.raises(RuntimeError, match="model is not patched"):
        forward(model, cache, prompt(1, 1))
    assert cache.columns == 13 and len(cache.materialize(0)) == 1  # still readable


def test_the_same_cache_in_two_threads(model):
    cache, inside, leave, seen = ours(model), threading.Event(), threading.Event(), []

    def wait(*_):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            leave.wait(30)

    handle = model.model.layers[1].register_forward_pre_hook(wait)
    thread = threading.Thread(target=lambda: seen.append(forward(model, cache, prompt())))
    thread.start()
    assert inside.wait(30)
    with pytest.raises(RuntimeError, match="step open in another thread"):
        forward(model, cache, prompt())
    leave.set()
    thread.join()
    handle.remove()
    assert torch.equal(seen[0], forward(model, ours(model), prompt()))
    assert cache.columns == 13


def test_budget_exceeded_before_a_page_is_taken(model):
    cache = KVCache.for_model(model, budget="16tok")
    forward(model, cache, prompt())
    refused(model, cache, "16", prompt(1, 4), error=BudgetExceeded)
    forward(model, cache, prompt(1, 3))
    with pytest.raises(BudgetExceeded):
        run(model, KVCache.for_model(model, budget="16tok"), prompt(), new=20)


# --- in generate -------------------------------------------------------------------------------------------------------


def test_generate_on_a_cache_of_an_unrelated_prompt(model):
    cache = ours(model)
    run(model, cache, prompt(), new=4)
    other = prompt(length=5, seed=8)
    with pytest.raises(ValueError, match=r"reset\(\)"):
        run(model, cache, other, attention_mask=torch.ones_like(other))
    cache.reset()
    assert run(model, cache, other, new=4) == run(model, ours(model), other, new=4)


def test_assisted_decoding_on_a_filled_cache(model):
    cache = ours(model)
    ids = torch.tensor(run(model, cache, prompt(), new=4))
    with pytest.raises(ValueError, match="attention_mask|position_ids"):
        run(model, cache, ids, attention_mask=torch.ones_like(ids), prompt_lookup_num_tokens=3)


# --- methods -----------------------------------------------------------------------------------------------------------


def test_crop(model):
    cache = ours(model)
    forward(model, cache, prompt())
    with pytest.raises(ValueError, match=r"crop\(3\): a positive length"):
        cache.crop(3)
    with pytest.raises(ValueError, match=r"crop\(-14\): only 13 columns"):
        cache.crop(-14)
    cache.crop(torch.tensor(-3))
    assert (cache.columns, cache.logical_length(0)) == (10, 10)


def test_crop_past_what_a_window_still_holds():
    model = patch(build("mistral"))
    cache = KVCache.for_model(model, hold=0)
    forward(model, cache, prompt(1, 200))
    with pytest.raises(ValueError, match="crop: length is 10"):
        cache.crop(-190)
    assert cache.columns == 200


def test_crop_with_recurrent_layers():
    model = patch(build("qwen3_next"))
    cache = ours(model)
    forward(model, cache, prompt())
    assert not cache.is_croppable
    with pytest.raises(ValueError, match="recurrent states cannot be taken back"):
        cache.crop(-1)


def test_tensors_per_layer_are_not_to_be_had(model):
    cache = ours(model)
    for use in (lambda: list(cache), lambda: cache[0]):
        with pytest.raises(TypeError, match="materialize"):
            use()
    with pytest.raises(Unsupported, match="early_initialization"):
        cache.early_initialization(1, 2, 16, torch.float32, "cpu")
    for name in ("crop", "reorder_cache", "batch_repeat_interleave", "batch_select_indices"):
        with pytest.raises(ValueError, match=f"call {name} on the cache"):
            getattr(cache.layers[0], name)(0)
    with pytest.raises(ValueError, match="call reset on the cache"):
        cache.layers[0].reset()


def test_rows_that_do_not_exist(model, filled):
    with pytest.raises(ValueError, match=r"rows must be in \[0, 4\), got \[0, 4\]"):
        filled[0].select([0, 4])


def test_a_dynamic_cache_still_works_beside_ours(model):
    assert run(model, DynamicCache(config=model.config), prompt(), new=4) == run(model, ours(model), prompt(), new=4)
    assert copy.deepcopy(ours(model)).columns == 0
