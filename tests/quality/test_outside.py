"""Peers of another environment: the other side's script, run here without a press, must be the dense cache."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kvstrata.quality import outside, report
from kvstrata.quality.contenders import PEERS, Contender
from kvstrata.quality.run import Config, Run
from kvstrata.quality.tasks import Example

PEERS_FOLDER = Path(__file__).resolve().parents[2] / "bench" / "quality" / "peers"
DENSE = "kvpress:Dense"


@pytest.fixture
def config(model_folder: Path) -> Config:
    return Config(str(model_folder), ("multi_query", "text"), (), ("DynamicCache",), ("50%", "64tok"), (512,), 2)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other environment is this one; "no press" is a peer."""
    monkeypatch.setattr(outside, "HOME", PEERS_FOLDER)
    monkeypatch.setattr(outside, "python", lambda: Path(sys.executable))
    monkeypatch.setitem(PEERS, DENSE, None)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("mode", "budgets"), [("query-agnostic", ("50%", "64tok")), ("query-aware", ("50%",))])
def test_without_a_press_it_is_the_dense_cache(
    config: Config, mode: str, budgets: tuple[str, ...], tmp_path: Path
) -> None:
    run = Run(tmp_path / "run", replace(config, peers=("DynamicCache", DENSE), mode=mode, budgets=budgets))
    run.work(lambda unit: None)
    assert {c.label for c in run.outside()} == {f"{DENSE} {budget}" for budget in budgets}
    for contender in run.outside():
        run.work_outside(contender)
    assert not run.outside() and not run.complaints
    dense = [r["answers"] for k, r in sorted(run.records.items()) if k[3] == "DynamicCache" and k[0] == "multi_query"]
    theirs = [
        r["answers"] for k, r in sorted(run.records.items()) if k[3] == DENSE and k[4] == "50%" and "answers" in r
    ]
    assert dense == theirs and len(dense) == 2
    refused = {r["refused"] for k, r in run.records.items() if "refused" in r}
    by_tokens = {"kvpress takes a share, not 64tok"} if "64tok" in budgets else set()
    assert refused == {"kvpress answers questions here, it scores no text"} | by_tokens
    report.make(run.folder, run.complaints)


@pytest.mark.usefixtures("here")
def test_its_failure_is_a_complaint_and_the_run_goes_on(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PEERS, "kvpress:Nonsense", None)
    run = Run(tmp_path / "run", replace(config, peers=("kvpress:Nonsense",), budgets=("50%",)))
    run.work_outside(Contender("kvpress:Nonsense", "50%"))
    assert len(run.complaints) == 1 and "invalid choice" in run.complaints[0]


def test_not_installed_is_a_complaint(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside, "HOME", tmp_path)
    run = Run(tmp_path / "run", replace(config, peers=("DynamicCache", "kvpress:SnapKV")))
    assert not run.outside()
    assert [c for c in run.complaints if "kvpress is not installed" in c]
    assert all(c.name == "DynamicCache" for unit in run.units() for c in unit.contenders)


def test_a_text_is_refused() -> None:
    assert outside.refusal(Contender("kvpress:SnapKV", "25%"), Example("a", (), (), continuation="b"))
    assert outside.refusal(Contender("kvpress:SnapKV", "25%"), Example("a", ("q",), ("a",))) is None
