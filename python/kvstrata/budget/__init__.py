"""Budgets: what a cache may hold, how it is divided over layers and heads, and who holds how much."""

from kvstrata.budget.allocate import AdaptiveHeads, Allocation, Allocator, Pyramid, RowsSeen, Uniform
from kvstrata.budget.entropy import EntropyShare
from kvstrata.budget.knapsack import Knapsack
from kvstrata.budget.powerlaw import PowerLaw
from kvstrata.budget.schedule import Profile, Schedule
from kvstrata.budget.sensitivity import Sensitivity, SensitivityProfile
from kvstrata.budget.units import Budget

__all__ = [
    "AdaptiveHeads",
    "Allocation",
    "Allocator",
    "Budget",
    "EntropyShare",
    "Knapsack",
    "PowerLaw",
    "Profile",
    "Pyramid",
    "RowsSeen",
    "Schedule",
    "Sensitivity",
    "SensitivityProfile",
    "Uniform",
]
