"""accelerate's hooks, torch.compile and tensor parallelism."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import modes
import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from modes import ours, padded, run, stock
from tiny import build

from kvstrata.hf import patch

HERE = Path(__file__).parent


def dispatched(model):
    return dispatch_model(model, device_map={"": "cpu"}, main_device="cpu", force_hooks=True)


def per_layer(model):
    names = [
        "model.embed_tokens",
        *(f"model.layers.{i}" for i in range(4)),
        "model.norm",
        "model.rotary_emb",
        "lm_head",
    ]
    return dispatch_model(model, device_map=dict.fromkeys(names, "cpu"), main_device="cpu", force_hooks=True)


def offloaded(model):
    return cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("order", ["patched before", "patched after"])
@pytest.mark.parametrize("place", [dispatched, per_layer, offloaded])
@pytest.mark.parametrize("name", ["llama", "stablelm"])
def test_accelerate(name, place, order):
    model = build(name)
    expected = [modes.left_padded(model, stock), modes.beams(model, stock)]
    model = place(patch(model)) if order == "patched before" else patch(place(model))
    assert [modes.left_padded(model, ours), modes.beams(model, ours)] == expected


class Graphs:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, _):
        self.count += 1
        return graph.forward


@pytest.mark.parametrize(("name", "way"), [("llama", "module"), ("stablelm", "module"), ("mistral", "forward")])
def test_compiled(name, way):
    torch._dynamo.reset()
    model, graphs = build(name), Graphs()
    ids, mask = padded()
    expected = run(model, stock(model), ids, new=8, attention_mask=mask)
    patch(model)
    if way == "module":
        model.compile(backend=graphs)
    else:
        model.forward = torch.compile(model.forward, backend=graphs)
    assert run(model, ours(model), ids, new=8, attention_mask=mask) == expected
    first = graphs.count
    assert first > 0
    assert run(model, ours(model), ids, new=8, attention_mask=mask) == expected
    assert graphs.count == first
    torch._dynamo.reset()


def test_tensor_parallel(tmp_path):
    """Two processes, gloo: each rank caches its own KV head."""
    build("llama").save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE / "rank.py"), str(tmp_path)],
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
    expected = modes.greedy(build("llama"), stock)
    for output in outputs:
        assert f"tokens {expected}" in output, output
        assert "heads [1, 1, 1, 1]" in output, output
