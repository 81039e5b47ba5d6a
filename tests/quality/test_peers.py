"""Peers: the bytes of a quantized cache, and the script that answers with kvpress, here with presses of our own."""

from __future__ import annotations

import importlib.util
import json
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
from transformers import Cache
from transformers.cache_utils import QuantizedLayer

from kvstrata.hf import peers
from kvstrata.hf.load import dense_cache

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "quality" / "peers" / "kvpress_run.py"
MODULES = {"hqq": "hqq", "quanto": "optimum.quanto"}

# --- quantized_cache ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama():
    """2 layers, 2 KV heads of 64, bf16."""
    sizes = {"hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 96}
    torch.manual_seed(3)
    config = transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("backend", ["hqq", "quanto"])
def test_quantized_bytes_are_those_of_every_tensor(llama, backend: str, bits: int) -> None:
    pytest.importorskip(MODULES[backend], reason=f"{peers.PACKAGES[backend]} is not installed")
    cache, dense = peers.quantized_cache(llama, backend, bits), dense_cache(llama)
    ids = torch.arange(200)[None] % 96
    with torch.no_grad():
        for tokens in (ids, ids[:, :1], ids[:, 1:4]):
            out = llama(tokens, past_key_values=cache).logits
            want = llama(tokens, past_key_values=dense).logits
    assert cache.get_seq_length() == 204
    packed = 200 * 2 * 64 * bits // 8 + 200 * 2 * 2 * 2  # and a bf16 scale and zero per head and token
    assert cache.nbytes() == 2 * 2 * (packed + 4 * 2 * 64 * 2)  # 4 tokens of bf16 residual
    layer = 2 * 2 * 64 * 2  # bytes of one dense token of a layer
    assert cache.peak_bytes == cache.nbytes() + layer * (200 + 204)
    assert (out - want).abs().max() < (0.25 if bits == 4 else 1) * want.abs().max()
    with torch.no_grad():  # the 128th residual token: all is packed anew
        llama(ids[:, :123], past_key_values=cache)
        llama(ids[:, :1], past_key_values=cache)
    assert cache.nbytes() == 2 * 2 * (packed * 328 // 200)


class Halved(QuantizedLayer):
    """Two bytes become one, without any package."""

    def _quantize(self, tensor, axis):
        return tensor.to(torch.float8_e4m3fn), {"scale": torch.ones(1, dtype=tensor.dtype)}

    def _dequantize(self, q):
        return q[0].to(q[1]["scale"].dtype)


def test_quantized_peak_counts_what_is_read_back() -> None:
    cache = peers.WatchedQuantizedCache.__new__(peers.WatchedQuantizedCache)
    Cache.__init__(cache, layers=[Halved(), Halved()])
    k = torch.ones(1, 2, 10, 8, dtype=torch.bfloat16)
    token = 2 * 2 * 8 * 2  # both, 2 heads of 8, bf16
    for layer in (0, 1):
        cache.update(k, k, layer)
    held = 2 * (10 * token // 2 + 4)
    assert cache.nbytes() == cache.peak_bytes == held
    cache.update(k[:, :, :3], k[:, :, :3], 1)
    assert cache.nbytes() == held + 3 * token
    assert cache.peak_bytes == held + 3 * token + (10 + 13) * token
    cache.update(k[:, :, :1], k[:, :, :1], 1)
    assert cache.peak_bytes == held + 4 * token + (10 + 14) * token


def test_tensors_are_found_at_any_depth() -> None:
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    found = list(peers.tensors({"a": a, "rest": [(b, {"c": c, "axis": 0}), "text", None]}))
    assert [t.numel() for t in found] == [1, 2, 3]


@pytest.mark.parametrize("backend", ["hqq", "quanto"])
def test_a_missing_backend_is_named(llama, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("is_hqq_available", "is_optimum_quanto_available"):
        monkeypatch.setattr(transformers.cache_utils, name, lambda: False)
    with pytest.raises(ImportError, match=f"pip install {peers.PACKAGES[backend]}"):
        peers.quantized_cache(llama, backend, 4)


def test_unknown_backend_and_bits_are_refused(llama) -> None:
    with pytest.raises(ValueError, match="backend: .*'fp8'"):
        peers.quantized_cache(llama, "fp8", 4)
    with pytest.raises(ValueError, match="bits: .*3"):
        peers.quantized_cache(llama, "hqq", 3)


# --- kvpress_run: the feed ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run():
    spec = importlib.util.spec_from_file_location("kvpress_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["kvpress_run"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model():
    return tiny.build("llama")


@pytest.fixture(params=[False, True], ids=["agnostic", "aware"])
def prompt(run, request):
    draw = torch.Generator().manual_seed(5)
    context, *questions = (torch.randint(0, tiny.VOCAB, (n,), generator=draw).tolist() for n in (60, 5, 1, 7))
    return run.Prompt("p", context, questions, [6, 1, 8], [], request.param)


class Cut:
    """A press that keeps the first 4 tokens of a prefill, every third, and the last 8."""

    @staticmethod
    def keeps(length: int) -> list[int]:
        return [i for i in range(length) if i < 4 or i % 3 == 0 or i >= length - 8]

    @contextmanager
    def __call__(self, model):
        def cut(module, args, kwargs, output):
            layer = kwargs["past_key_values"].layers[module.layer_idx]
            kept = self.keeps(layer.keys.shape[2])
            layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]

        hooks = [one.self_attn.register_forward_hook(cut, with_kwargs=True) for one in model.model.layers]
        yield
        for hook in hooks:
            hook.remove()


def plain(model, prompt, keeps=None) -> tuple[list[list[int]], int]:
    """Answers without any cache, and the tokens fed. keeps: what later tokens still see of a prefill of that length."""
    prefill = len(prompt.context) + (len(prompt.questions[0]) if prompt.aware else 0)
    gone = [] if keeps is None else sorted(set(range(prefill)) - set(keeps(prefill)))

    def best(tokens: list[int]) -> int:
        n = len(tokens)
        mask = torch.full((n, n), -torch.inf).triu(1)
        mask[prefill:, gone] = -torch.inf
        with torch.no_grad():
            return int(model(torch.tensor([tokens]), attention_mask=mask[None, None]).logits[0, -1].argmax())

    tokens, answers = list(prompt.context), []
    for question, most in zip(prompt.questions, prompt.most, strict=True):
        tokens += question
        answers.append([])
        while True:
            tokens.append(best(tokens))
            if tokens[-1] in prompt.stop:
                break
            answers[-1].append(tokens[-1])
            if len(answers[-1]) == most:
                break
    return answers, len(tokens) - 1  # the last one is never fed


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("stopped", [False, True])
def test_answers_are_those_without_a_cache(run, model, prompt, cut: bool, stopped: bool) -> None:
    press, keeps = (Cut(), Cut.keeps) if cut else (nullcontext, None)
    if stopped:  # the third token of the first answer ends it, and may end others
        prompt = replace(prompt, stop=[plain(model, prompt, keeps)[0][0][2]])
    row = run.answer(model, prompt, press)
    answers, fed = plain(model, prompt, keeps)
    assert row["answers"] == answers
    stops = sum(len(said) < most for said, most in zip(answers, prompt.most, strict=True))
    assert stops > 0 if stopped else stops == 0
    assert row["decoded"] == sum(map(len, answers)) + stops
    assert len(row["ms"]) == row["decoded"] - len(answers)

    prefill = len(prompt.context) + (len(prompt.questions[0]) if prompt.aware else 0)
    stored = fed - (prefill - len(Cut.keeps(prefill)) if cut else 0)
    token = 4 * 2 * 2 * 16 * 4  # 4 layers, both, 2 KV heads of 16, fp32
    assert row["bytes"] == row["kept_bytes"] == stored * token
    # Growing by concatenation: the last layer's old and new keys at once.
    grown = stored * token + (stored - 1) * token // 8
    # While the last layer is cut: its dense tensors beside those of all layers cut.
    halved = len(Cut.keeps(prefill)) * token + prefill * token // 4 if cut else 0
    assert row["peak_bytes"] == pytest.approx(max(grown, halved), abs=token // 8)


def test_a_cut_is_in_the_peak(run, model, prompt) -> None:
    prompt = replace(prompt, questions=[[1]], most=[1], aware=False)
    row = run.answer(model, prompt, Cut())
    kept, token = len(Cut.keeps(60)), 4 * 2 * 2 * 16 * 4
    assert row["bytes"] == (kept + 1) * token
    assert row["peak_bytes"] == kept * token + 60 * token // 4


def test_masked_slots_stay_in_bytes_and_leave_kept_bytes(run, model, prompt) -> None:
    @contextmanager
    def masks(model):
        yield
        zeros = torch.zeros(10, dtype=torch.long)
        model.model.layers[1].self_attn.masked_key_indices = (zeros, zeros, torch.arange(10))

    try:
        row = run.answer(model, prompt, masks)
    finally:
        del model.model.layers[1].self_attn.masked_key_indices
    assert row["bytes"] - row["kept_bytes"] == 10 * 2 * 16 * 4


# --- kvpress_run: files ---------------------------------------------------------------------------------------------

NAMES = {"press": "Dense", "ratio": 0.0, "dtype": "float32"}


def rows(path: Path) -> list[dict]:
    return [{**json.loads(line), "ms": 0} for line in path.read_text().splitlines()]


def test_a_run_goes_on_after_the_last_whole_row(run, model, prompt, tmp_path: Path) -> None:
    prompts = [replace(prompt, id=str(i), context=prompt.context[i:]) for i in range(3)]
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert run.write_rows(model, prompts, whole, lambda: nullcontext, NAMES) == 3
    text = whole.read_bytes()
    first = text.index(b"\n") + 1
    for end, missing in ((0, 3), (first - 1, 3), (first, 2), (first + 20, 2), (len(text) - 1, 1), (len(text), 0)):
        cut.write_bytes(text[:end])
        assert run.write_rows(model, prompts, cut, lambda: nullcontext, NAMES) == missing
        assert rows(cut) == rows(whole)


def test_rows_of_another_run_and_malformed_rows_are_refused(run, model, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text(json.dumps({"id": "a", **NAMES, "ratio": 0.5}) + "\n")
    with pytest.raises(ValueError, match="line 1 is of another run"):
        run.finished(out, NAMES)
    out.write_text(json.dumps({"id": "a", **NAMES}) + "\n{\n")
    with pytest.raises(ValueError, match="line 2 is not a row"):
        run.finished(out, NAMES)


@pytest.mark.parametrize(
    "wrong", ["{", "[]", '{"id": "a"}', '{"most": [0]}', '{"most": [1, 1]}', '{"context": []}', '{"questions": [[]]}']
)
def test_a_malformed_prompt_is_named_by_its_line(run, wrong: str, tmp_path: Path) -> None:
    good = {"id": "a", "context": [1], "questions": [[2]], "most": [1], "stop": [], "aware": False}
    if wrong[2:3] in {"m", "c", "q"}:
        wrong = json.dumps({**good, **json.loads(wrong)})
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(good) + "\n\n" + wrong + "\n")
    with pytest.raises(ValueError, match="prompts.jsonl, line 3: "):
        list(run.read_prompts(path))


@pytest.mark.parametrize("missing", [False, True])
def test_a_failure_is_one_line_and_exit_code_1(run, model, missing, monkeypatch, capsys, tmp_path: Path) -> None:
    def broken(ratio):
        raise AssertionError("no ratio\nlike that")

    module = None if missing else SimpleNamespace(SnapKVPress=broken)
    monkeypatch.setitem(sys.modules, "kvpress", module)  # None: import raises ModuleNotFoundError
    monkeypatch.setattr(run.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: model)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "a", "context": [1], "questions": [[2]], "most": [1], "stop": []}\n')
    args = f"run --model m --prompts {prompts} --out {tmp_path / 'out'} --press SnapKV --ratio 2"
    monkeypatch.setattr(sys, "argv", args.split())
    assert run.main() == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert ("setup.sh" if missing else "SnapKV at 2.0: prompt a: AssertionError: no ratio like that") in said
