"""Several caches on one model at once, and several models at once."""

from __future__ import annotations

import threading

import modes
from modes import ours, prompt, run, stock
from tiny import build

from kvstrata.hf import patch


def together(jobs):
    """Run all jobs at the same time; their results in order."""
    out, barrier = [None] * len(jobs), threading.Barrier(len(jobs))

    def work(i, job):
        barrier.wait(60)
        out[i] = job()

    threads = [threading.Thread(target=work, args=(i, job)) for i, job in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return out


def test_three_threads_on_one_model():
    model = patch(build("gemma3"))
    jobs = [
        lambda: modes.greedy(model, ours),
        lambda: modes.left_padded(model, ours),
        lambda: run(model, stock(model), prompt(seed=6)),
    ]
    expected = [job() for job in jobs]
    assert together(jobs) == expected


def test_two_models_of_one_config_at_once():
    first = build("llama")
    second = patch(type(first)(first.config).eval())
    patch(first)
    jobs = [lambda: modes.greedy(first, ours), lambda: modes.greedy(second, ours), lambda: modes.greedy(first, stock)]
    expected = [job() for job in jobs]
    assert expected[0] != expected[1]
    assert together(jobs) == expected


def test_steps_of_two_caches_interleave():
    import torch

    model = patch(build("mistral"))
    ids = [prompt(seed=1), prompt(seed=2)]
    expected = [run(model, ours(model), x, new=8) for x in ids]
    caches, tokens = [ours(model), ours(model)], [x.clone() for x in ids]
    feed = list(ids)
    with torch.no_grad():
        for _ in range(8):
            for i in range(2):
                feed[i] = model(feed[i], past_key_values=caches[i]).logits[:, -1:].argmax(-1)
                tokens[i] = torch.cat([tokens[i], feed[i]], 1)
    assert [x.tolist() for x in tokens] == expected
