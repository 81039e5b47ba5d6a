"""No causal-LM class of the installed transformers may answer differently: identical, or refused with its reason."""

from __future__ import annotations

import pytest
from sweep import sweep

IDENTICAL = 80


@pytest.mark.slow
def test_every_causal_lm_class():
    outcomes = list(sweep())
    kinds = {kind: [o for o in outcomes if o.kind == kind] for kind in {o.kind for o in outcomes}}
    assert not kinds.get("different"), kinds["different"]
    assert not kinds.get("trivial"), kinds["trivial"]
    assert all(o.reason for o in kinds["refused"])
    assert len(kinds["identical"]) >= IDENTICAL, [(o.name, o.reason) for o in kinds["not buildable"]]
