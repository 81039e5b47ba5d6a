"""Pages by meaning, a Far tier, and only what a query needs: packers, selectors, the planner that archives."""

from kvstrata.recall.archive import Archive
from kvstrata.recall.chooser import Chooser, Summaries
from kvstrata.recall.far import Far
from kvstrata.recall.ladder import Ladder, PageMass
from kvstrata.recall.packers import Greedy, KMeans, Position
from kvstrata.recall.selectors import Bounds, MassThreshold, PageMeans, SplitMeans, TopPages, TopTokens

__all__ = [
    "Archive",
    "Bounds",
    "Chooser",
    "Far",
    "Greedy",
    "KMeans",
    "Ladder",
    "MassThreshold",
    "PageMass",
    "PageMeans",
    "Position",
    "SplitMeans",
    "Summaries",
    "TopPages",
    "TopTokens",
]
