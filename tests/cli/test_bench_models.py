"""`kvstrata bench decode | memory` with a tiny shape: what they print, what they refuse. No time is asserted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstrata.cli import main
from kvstrata.cli.bench import decode
from kvstrata.cli.bench.clock import Clock
from kvstrata.hf import KVCache, patch, shapes

TINY = shapes.ModelShape("qwen3", 64, 96, 2, 4, 2, 64, 128, True)
ARGUMENTS = ("--shape", "tiny", "--context", "1024,3000", "--policies", "full,arkv", "--json")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["bench", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == 1 and found["run"]["parameters"] > 0
    return found  # type: ignore[no-any-return]


def test_decode(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = said(capsys, "decode", *ARGUMENTS, "--steps", "3", "--out", str(tmp_path))["rows"]
    assert [(r["context"], r["cache"], r["budget"]) for r in rows] == [
        (n, cache, budget)
        for n in (1024, 3000)
        for cache, budget in (("DynamicCache", None), ("full", None), ("arkv", "25%"))
    ]
    for dense, full, arkv in (rows[:3], rows[3:]):
        tokens = dense["context"] + decode.WARM + 3
        assert dense["dense_bytes"] == dense["near_bytes"] == tokens * 2 * 2 * 2 * 64 * 2, (
            "layers, heads, K and V, bf16"
        )
        assert dense["stored_tokens"] == full["stored_tokens"] == tokens > arkv["stored_tokens"]
        assert dense["near_bytes"] <= full["near_bytes"] and arkv["near_bytes"] <= 0.26 * dense["near_bytes"]
        assert dense["speedup"] == 1.0 and arkv["turns"] and 0 < arkv["ms_p50"] <= arkv["ms_p99"]
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == ["decode-ms_p50.png", "decode-near_bytes.png", "decode.json"]


def test_memory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = said(capsys, "memory", *ARGUMENTS, "--context", "5000", "--out", str(tmp_path))["rows"]
    arkv = [r for r in rows if r["cache"] == "arkv"]
    assert [r["tokens"] for r in arkv] == [2048, 4096, 5000]
    assert all(r["near_bytes"] <= r["peak_bytes"] <= 0.25 * r["dense_bytes"] for r in arkv)
    dense = [r for r in rows if r["cache"] == "DynamicCache"]
    assert dense[-1]["near_bytes"] == dense[-1]["dense_bytes"] < dense[-1]["peak_bytes"]
    assert (tmp_path / "memory-peak_bytes.png").exists()


def test_where_memory_is_short_caches_run_one_after_another(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Clock, "free_bytes", lambda self: 0)
    rows = said(capsys, "decode", *ARGUMENTS, "--context", "200", "--policies", "full", "--steps", "1")["rows"]
    assert [r["turns"] for r in rows] == [False, False]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--policies", "fulll"), "policies: 'fulll' is unknown"),
        (("--peers", "kvpress:SnapKV"), "kvpress:SnapKV: it runs in an environment of its own"),
        (("--budgets", "x%"), "x%"),
    ],
)
def test_what_is_refused(arguments: tuple[str, str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "decode", *ARGUMENTS, *arguments]) == 1
    assert text in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_shape_is_a_model_that_computes(kind: str) -> None:
    """Finite logits that depend on positions: rotary frequencies came through."""
    model = patch(shapes.ModelShape(kind, 64, 96, 2, 4, 2, 64, 128, kind == "qwen3").build())
    tokens = torch.tensor([[1, 2, 3, 1, 2, 3]])
    with torch.inference_mode():
        logits = model(tokens, past_key_values=KVCache.for_model(model)).logits
    assert logits.isfinite().all() and not torch.equal(logits[0, 2], logits[0, 5])
    inverse = model.model.rotary_emb.inv_freq
    assert inverse[0] == 1 and (inverse.diff() < 0).all()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (kind == "qwen3")
