"""The model of lm-eval: its own numbers where nothing is dropped, and a compressed cache that is really read.

CI does not install lm-eval, so there all but the first test are skipped.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import yaml
from tiny import VOCAB, build

from kvstrata.hf import KVCache, patch

BUDGET = "64tok"  # sinks 4 and a window of 32
BYTES = "280KiB"  # a window of 80 for one sequence; refused for two
LONG, SHORT = 150, 20
BROKEN = "import runpy, sys; sys.modules['lm_eval'] = None; runpy.run_module('kvstrata.hf.lm_eval', run_name={!r})"


@pytest.mark.parametrize("name", ["__main__", "kvstrata.hf.lm_eval"])
def test_without_the_harness_the_command_is_named(name):
    done = subprocess.run([sys.executable, "-c", BROKEN.format(name)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert 'pip install "kvstrata[lm-eval]"' in done.stderr
    assert ("Traceback" in done.stderr) == (name != "__main__")


# --- A model, a tokenizer and three tasks in a folder ------------------------------------------------------------------


@pytest.fixture(scope="module")
def harness():
    return pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed; it is too heavy for CI")


def words(n, seed):
    ids = torch.randint(4, VOCAB, (n,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{i}" for i in ids)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model/: a tiny Llama and a tokenizer of one word per id. tasks/: generation, choices and rolling over a file."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("lm_eval")
    model = build("llama")
    model.save_pretrained(root / "model")
    vocab = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(root / "model")

    rows = [
        {"context": words(n, seed), "choices": [words(3, 50 + seed), words(1, 70 + seed), words(5, 90 + seed)]}
        for seed, n in enumerate((LONG, SHORT, LONG, 33, LONG + 9))
    ]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(root / "data.jsonl")}, "cache_dir": str(root / "cache")},
        "test_split": "test",
        "doc_to_text": "{{context}}",
    }
    tasks = {
        "tiny_generate": {
            "output_type": "generate_until",
            "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": ["w77"], "max_gen_toks": 24, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
        "tiny_choice": {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": 0,
            "metric_list": [{"metric": "acc"}],
        },
        "tiny_rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{context}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
    }
    (root / "tasks").mkdir()
    for name, task in tasks.items():
        (root / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **base, **task}))
    return root


@pytest.fixture(scope="module")
def tasks(harness, folder):
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder / "tasks"), include_defaults=False)


@pytest.fixture(scope="module")
def answers(harness, folder, tasks):
    """A function that runs the tasks on a model of the harness and gives the responses: task -> list per document."""

    def run(model, names=("tiny_generate", "tiny_choice", "tiny_rolling"), **arguments):
        arguments = {"pretrained": str(folder / "model"), "dtype": "float32", **arguments}
        results = harness.simple_evaluate(
            model=model,
            model_args=arguments,
            tasks=list(names),
            task_manager=tasks,
            batch_size=2,
            device="cpu",
            bootstrap_iters=0,
        )
        out = {}
        for name in names:
            samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
            out[name] = [sample["filtered_resps"] for sample in samples]
        return out, results

    import kvstrata.hf.lm_eval  # noqa: F401 registers the model

    return run


@pytest.fixture(scope="module")
def stock(answers):
    return answers("hf")[0]


@pytest.fixture
def make(harness, folder):
    """Makes our model of the harness, in process."""
    from kvstrata.hf.lm_eval import KVStrataLM

    return lambda **kwargs: KVStrataLM(str(folder / "model"), dtype="float32", device="cpu", batch_size=1, **kwargs)


def logs(responses):
    """Every log-probability of a task's responses, as f64 [n]."""
    flat = [x for resps in responses for x in resps]
    return torch.tensor([x[0] if isinstance(x, (tuple, list)) else x for x in flat], dtype=torch.float64)


# --- Nothing dropped: the harness's own numbers ------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, {"policy": "full", "chunk": 16, "stride": 7}], ids=["default", "pieces"])
def test_full_equals_the_stock_model(answers, stock, arguments):
    ours, results = answers("kvstrata", **arguments)
    assert ours["tiny_generate"] == stock["tiny_generate"]
    torch.testing.assert_close(logs(ours["tiny_choice"]), logs(stock["tiny_choice"]), rtol=0, atol=1e-4)
    # The stock model adds up in f32: sums beyond 1,000 are a step of 1.2e-4 apart, which is the relative tolerance.
    torch.testing.assert_close(logs(ours["tiny_rolling"]), logs(stock["tiny_rolling"]), rtol=2.4e-7, atol=1e-4)
    greedy = [[[x[1] for x in resps] for resps in run["tiny_choice"]] for run in (ours, stock)]
    assert greedy[0] == greedy[1]
    config = results["config"]
    assert config["kvstrata_policy"] == "full" and config["kvstrata_budget"] is None
    assert config["kvstrata_mode"] == "query-aware" and config["kvstrata_cache_bytes"] > 0


def test_greedy_is_told(make):
    lm = make()
    context = lm.tok_encode(words(LONG, 0))
    with torch.no_grad():
        best = int(lm.model(torch.tensor([context])).logits[0, -1].argmax())
    answers = lm._loglikelihood_tokens([(None, context, [best]), (None, context, [best ^ 1])], disable_tqdm=True)
    assert [greedy for _, greedy in answers] == [True, False]


# --- Tokens dropped: the numbers are those of what was kept ------------------------------------------------------------


def test_a_dropping_policy_changes_what_is_longer_than_its_budget(answers, stock):
    ours, results = answers("kvstrata", policy="streaming", budget=BUDGET)
    assert results["config"]["kvstrata_budget"] == BUDGET
    for i, n in enumerate((LONG, SHORT, LONG, 33, LONG + 9)):
        gaps = (logs([ours["tiny_choice"][i]]) - logs([stock["tiny_choice"][i]])).abs()
        rolling = (logs([ours["tiny_rolling"][i]]) - logs([stock["tiny_rolling"][i]])).abs()
        if n > 100:
            assert gaps.min() > 1e-2 and rolling.min() > 1e-2
            assert ours["tiny_generate"][i] != stock["tiny_generate"][i]
        else:
            assert gaps.max() < 1e-4 and rolling.max() < 1e-4
        if n == SHORT:  # nor does its answer leave the window
            assert ours["tiny_generate"][i] == stock["tiny_generate"][i]


def test_scores_are_those_of_a_dense_cache_that_hides_what_was_dropped(make):
    lm = make(policy="streaming", budget=BUDGET)
    context, continuation = lm.tok_encode(words(LONG, 3)), lm.tok_encode(words(6, 4))
    ((score, _),) = lm._loglikelihood_tokens([(None, context, continuation)], disable_tqdm=True)

    known = len(context) - 1
    cache = KVCache.for_model(lm.model, policy="streaming", budget=BUDGET)
    with torch.no_grad():
        lm.model(torch.tensor([context[:-1]]), past_key_values=cache, use_cache=True)
    cache.end_prefill()
    ((_, _, positions),) = cache.materialize(0)  # i32 [H, N]; this policy keeps the same tokens everywhere
    kept = set(positions.flatten().tolist()) - {-1}
    assert len(kept) < 64

    ids = torch.tensor([context + continuation[:-1]])
    seen = torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
    seen[known:, [i for i in range(known) if i not in kept]] = False
    with torch.no_grad():
        dense = build("llama")(ids, attention_mask=seen[None, None]).logits[0, known:].log_softmax(-1)
    expected = dense.gather(1, torch.tensor(continuation)[:, None]).sum()
    assert abs(score - float(expected)) < 1e-4


@pytest.mark.parametrize(("budget", "prefills"), [(BUDGET, 1), (BYTES, 3)], ids=["tokens", "bytes"])
def test_choices_share_their_context(make, monkeypatch, budget, prefills):
    lm = make(policy="streaming", budget=budget)
    context = lm.tok_encode(words(LONG, 0))
    choices = [lm.tok_encode(words(n, 60 + n)) for n in (3, 1, 5)] + [[9]]  # the last shares the forward of [1]
    requests = [(None, context, choice) for choice in choices]
    single = [lm._loglikelihood_tokens([request], disable_tqdm=True)[0] for request in requests]

    made, prefilled = [], lm._prefilled
    monkeypatch.setattr(lm, "_prefilled", lambda tokens: made.append(tokens) or prefilled(tokens))
    assert lm._loglikelihood_tokens(requests, disable_tqdm=True) == single
    assert len(made) == prefills
    assert logs([single]).unique().numel() == len(choices)


def test_a_context_is_cut_on_the_left_as_the_stock_model_cuts(make, folder):
    from lm_eval.models.huggingface import HFLM

    lm = make()
    context, continuation = lm.tok_encode(words(lm.max_length + 30, 5)), lm.tok_encode(words(4, 6))
    dense = HFLM(str(folder / "model"), dtype="float32", device="cpu", batch_size=1)
    request = [(None, context, continuation)]
    ours, theirs = (x._loglikelihood_tokens(request, disable_tqdm=True)[0] for x in (lm, dense))
    assert abs(ours[0] - theirs[0]) < 1e-4 and ours[1] == theirs[1]
    with pytest.raises(ValueError, match="got 30 and 0"):
        lm._loglikelihood_tokens([(None, context[:30], [])], disable_tqdm=True)


# --- Arguments and the shell --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": "none such"}, "unknown"),
        ({"policy": "streaming"}, "needs one"),
        ({"policy": "streaming", "budget": 0.25}, "ambiguous"),
        ({"mixed_precision_dtype": "bfloat16"}, "give dtype="),
        ({"chunk": 0}, "chunk: expected"),
        ({"stride": None}, "stride: expected"),
    ],
)
def test_what_cannot_work_is_refused_at_construction(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_a_model_in_memory(harness, folder, make):
    from transformers import AutoTokenizer

    from kvstrata.hf.lm_eval import KVStrataLM

    model, tokenizer = patch(build("llama")), AutoTokenizer.from_pretrained(folder / "model")
    lm = KVStrataLM(model, tokenizer=tokenizer, policy="streaming", budget=BUDGET)
    request = [(None, lm.tok_encode(words(LONG, 0)), [5, 6])]
    other = make(policy="streaming", budget=BUDGET)
    assert lm._loglikelihood_tokens(request, True) == other._loglikelihood_tokens(request, True)


@pytest.mark.slow
def test_the_command_line(harness, folder, tmp_path):
    arguments = f"pretrained={folder / 'model'},dtype=float32,policy=streaming,budget={BUDGET}"
    command = [sys.executable, "-m", "kvstrata.hf.lm_eval", "--model", "kvstrata", "--model_args", arguments]
    command += ["--tasks", "tiny_generate,tiny_choice,tiny_rolling", "--include_path", str(folder / "tasks")]
    command += ["--device", "cpu", "--batch_size", "2", "--output_path", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tiny_choice" in done.stdout
    (file,) = tmp_path.rglob("results*.json")
    results = json.loads(file.read_text())
    assert results["config"]["kvstrata_policy"] == "streaming" and results["config"]["kvstrata_budget"] == BUDGET
    assert set(results["results"]) == {"tiny_generate", "tiny_choice", "tiny_rolling"}
