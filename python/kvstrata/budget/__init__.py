"""Budgets: what a cache may hold, how it is divided over layers and heads, and who holds how much."""

from kvstrata.budget.account import Account, Scope, ScopeReport
from kvstrata.budget.allocate import AdaptiveHeads, Allocation, Allocator, Pyramid, RowsSeen, Uniform
from kvstrata.budget.entropy import EntropyShare
from kvstrata.budget.knapsack import Knapsack
from kvstrata.budget.ledger import Hold, Ledger
from kvstrata.budget.powerlaw import PowerLaw
from kvstrata.budget.regime import Regime
from kvstrata.budget.schedule import Profile, Schedule
from kvstrata.budget.sensitivity import Sensitivity, SensitivityProfile
from kvstrata.budget.units import Budget

__all__ = [
    "Account",
    "AdaptiveHeads",
    "Allocation",
    "Allocator",
    "Budget",
    "EntropyShare",
    "Hold",
    "Knapsack",
    "Ledger",
    "PowerLaw",
    "Profile",
    "Pyramid",
    "Regime",
    "RowsSeen",
    "Schedule",
    "Scope",
    "ScopeReport",
    "Sensitivity",
    "SensitivityProfile",
    "Uniform",
]
