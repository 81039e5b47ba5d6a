"""patch and unpatch: idempotent, complete, and without a trace in copies, pickles and saved configs."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import modes
import pytest
import torch
from modes import ours
from tiny import BUILDERS, build

from kvstrata.hf import KVCache, patch, patched, unpatch
from kvstrata.hf.hooks import HOOKS


def fingerprint(model):
    """Hooks of every module, attribute names, and the attention implementation of every config."""
    seen = []
    for name, module in model.named_modules():
        tables = {k: list(v.values()) for k, v in module.__dict__.items() if "_hooks" in k and isinstance(v, dict)}
        config = getattr(module, "config", None)
        implementation = getattr(config, "_attn_implementation_internal", None)
        seen.append((name, tables, sorted(module.__dict__), module.training, implementation))
    return seen


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("name", BUILDERS)
def test_unpatch_leaves_nothing_behind(name):
    model, ids = build(name), modes.prompt()
    model.train()
    model.eval()
    before, out = fingerprint(model), logits(model, ids)
    random = torch.get_rng_state()
    assert patch(model) is model
    assert torch.equal(random, torch.get_rng_state())
    assert fingerprint(model) != before
    assert torch.equal(logits(model, ids), out)
    assert unpatch(model) is model
    assert fingerprint(model) == before
    assert torch.equal(logits(model, ids), out)


def test_patch_twice_is_patch_once():
    model = patch(build("gemma3_mm"))
    once = fingerprint(model)
    assert fingerprint(patch(model)) == once
    unpatch(model)
    unpatch(model)
    assert not any(hook in HOOKS for m in model.modules() for hook in m._forward_pre_hooks.values())


def test_with_patched_nests_and_restores_the_state_at_entry():
    model = build("llama")
    before = fingerprint(model)
    with patched(model) as same:
        assert same is model
        inside = fingerprint(model)
        with patched(model):
            pass
        assert fingerprint(model) == inside
    assert fingerprint(model) == before
    patch(model)
    with pytest.raises(KeyError), patched(model):
        raise KeyError
    assert fingerprint(model) == inside


def test_a_patched_model_copies_and_pickles():
    model = patch(build("llama"))
    expected = modes.greedy(model, ours)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert modes.greedy(other, ours) == expected
        unpatch(other)
        assert other.config._attn_implementation == "sdpa"
        assert modes.greedy(model, ours) == expected  # its own patch is untouched
        with pytest.raises(RuntimeError, match=r"call kvstrata\.patch\(model\)"):
            KVCache.for_model(other)


def test_a_saved_config_has_no_trace(tmp_path):
    model = patch(build("llama"))
    model.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.json"):
        assert "kvstrata" not in file.read_text(), file
    assert "attn_implementation" not in json.loads((tmp_path / "config.json").read_text())


def test_training_mode_is_kept_by_the_probe():
    model = build("llama")
    model.train()
    model.model.layers[1].eval()
    before = [m.training for m in model.modules()]
    patch(model)
    assert [m.training for m in model.modules()] == before


def test_two_models_of_one_config_object():
    """The attention name lives in the config: unpatching one model must not let the other answer wrongly."""
    first = build("llama")
    second = type(first)(first.config).eval()
    expected = modes.greedy(second, modes.stock)
    patch(first)
    patch(second)
    assert modes.greedy(second, ours) == expected
    unpatch(first)
    assert first.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="changed to 'sdpa' after patch"):
        modes.greedy(second, ours)
    patch(second)
    assert modes.greedy(second, ours) == expected
    unpatch(second)
    assert second.config._attn_implementation == "sdpa"


def test_a_wrapper_may_be_patched_and_the_base_unpatched():
    model = build("llama")
    before = fingerprint(model)
    patch(model.model)
    assert modes.greedy(patch(model), ours) == modes.greedy(model, modes.stock)
    unpatch(model)
    assert fingerprint(model) == before


def test_no_name_is_registered_before_the_first_patch():
    code = (
        "import kvstrata.hf\n"
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as a\n"
        "from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as m\n"
        "from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING as d\n"
        "names = [*a.valid_keys(), *m.valid_keys(), *(c.__module__ for c in d.values())]\n"
        "assert not [n for n in names if 'kvstrata' in n], names\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_registered_names_switch_on_no_special_treatment():
    from kvstrata.hf.attention import NAMES

    for name in NAMES.values():
        assert not any(word in name for word in ("flash", "sdpa", "flex_attention", "/"))
        assert not name.startswith("paged|")
