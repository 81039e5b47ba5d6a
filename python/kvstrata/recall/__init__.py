"""Pages by meaning, a Far tier, and only what a query needs: packers, selectors, the planner that archives."""

from kvstrata.recall.archive import Archive
from kvstrata.recall.far import Far
from kvstrata.recall.ladder import Ladder, PageMass
from kvstrata.recall.packers import Greedy, KMeans, Position
from kvstrata.recall.selectors import Bounds, MassThreshold, PageMeans, SplitMeans, TopPages, TopTokens

__all__ = [
    "Archive",
    "Bounds",
    "Far",
    "Greedy",
    "KMeans",
    "Ladder",
    "MassThreshold",
    "PageMass",
    "PageMeans",
    "Position",
    "SplitMeans",
    "TopPages",
    "TopTokens",
]
