"""bench/session.py: steps that fail, hang or have no time left do not lose the others. Nothing is built, no GPU is asked."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_session", ROOT / "bench" / "session.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules["gpu_session"] = made  # dataclasses look it up
    spec.loader.exec_module(made)
    return made


def python(module: ModuleType, name: str, code: str, seconds: int = 30, **more: Any) -> Any:
    return module.Step(name, seconds, [sys.executable, "-c", code], **more)


def test_what_comes_of_each_step(module: ModuleType, tmp_path: Path) -> None:
    session = module.Session(tmp_path, 300, {"gpu": "none"}, {})
    hang = (
        "import subprocess, sys, time\nprint('begun', flush=True)\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\ntime.sleep(60)"
    )
    steps = [
        python(module, "good", "print('2 passed')"),
        python(module, "bad", "import sys; print('why', file=sys.stderr); sys.exit(3)"),
        python(module, "hangs", hang, seconds=2),
        python(module, "bench", "print('{\"rows\": [1]}')", json=True),
        python(module, "broken", "print('no object')", json=True),
        python(module, "absent", "", needs="no-such-program"),
    ]
    began = time.monotonic()
    outcomes = [session.run(step) for step in steps]
    assert time.monotonic() - began < 50, "the child of what hangs was waited for"
    assert [o.status for o in outcomes] == [0, 3, "stopped", 0, "no JSON", "absent"]
    assert [o.said for o in outcomes[:3]] == ["2 passed", "why", "begun"]
    assert [o.good for o in outcomes] == [True, False, False, True, False, True]
    held = json.loads((tmp_path / "session.json").read_text())
    assert [s["name"] for s in held["steps"]] == [s.name for s in steps] and held["run"] == {"gpu": "none"}
    assert json.loads((tmp_path / "benches.json").read_text()) == {"bench": {"rows": [1]}}
    assert "why" in (tmp_path / "session.log").read_text()
    module.summary(session)


def test_without_time_steps_are_left_out(module: ModuleType, tmp_path: Path) -> None:
    session = module.Session(tmp_path, 0, {}, {})
    assert session.run(python(module, "late", "print('never')")).status == "left out"


def test_names_differ_and_commands_exist(module: ModuleType) -> None:
    steps = module.steps()
    assert len({s.name for s in steps}) == len(steps)
    for step in steps:
        for word in step.command:
            if word.startswith(("bench/", "tests/")):
                assert (ROOT / word).exists(), f"{step.name}: {word}"


def test_without_a_device_there_is_no_session(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "facts_of", lambda: {"gpu": "", "driver": "", "capability": ""})
    monkeypatch.setattr(sys, "argv", ["session.py", str(tmp_path / "out")])
    assert module.main() == 1
    assert "sees no CUDA device" in capsys.readouterr().out and not (tmp_path / "out").exists()
