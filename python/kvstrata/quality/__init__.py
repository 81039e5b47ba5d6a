"""Quality: tasks, peers and the harness that runs policies on them and draws score against bytes."""

MODES = ("query-agnostic", "query-aware", "stepwise")
"""How a question meets its context (:mod:`kvstrata.quality.measure`)."""
