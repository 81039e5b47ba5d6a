"""Budgets: what a cache may hold. Units here; allocators, schedules and the ledger build on them."""

from kvstrata.budget.units import Budget as Budget

__all__ = ["Budget"]
