"""Time the ops on this machine, each beside its baseline in the same run."""
