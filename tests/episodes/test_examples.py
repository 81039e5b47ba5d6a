"""The examples of conversations run, and say what they are there to say."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from kvstrata.episodes import InputEmbedding, conversation

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_conversation(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(conversation, "auto", InputEmbedding)  # MiniLM takes longer to load than all the rest
    monkeypatch.setattr(sys, "argv", ["conversation.py", str(tmp_path / "new")])
    runpy.run_path(str(EXAMPLES / "conversation.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert said.count("What is the code of the ") == 4 and "episode 3: " in said
    assert (tmp_path / "new" / "episodes.png").is_file() and (tmp_path / "new" / "talk.kv" / "MANIFEST.json").is_file()
    assert said.rstrip().endswith("after 106 turns")


def test_custom_chat_model(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "custom_chat_model.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "4 episodes, read: (" in said and "a cache of all tokens" in said
