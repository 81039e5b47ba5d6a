"""A picture of a conversation's episodes over time."""

from __future__ import annotations

import os
from bisect import bisect_left
from importlib import import_module
from typing import Any

from kvstrata.config import Unsupported
from kvstrata.episodes.conversation import USER, Conversation

COLOURS = ("#4477aa", "#ee6677", "#228833", "#aa3377", "#66ccee", "#ccbb44", "#994455", "#997700")
GREY = "#bbbbbb"
LANE = 0.8
"""Height of a window, of the lane of its episode."""


def picture(conversation: Conversation, path: str | os.PathLike[str]) -> None:
    """Draws the windows in the order in which they were said, one lane and colour for each episode; strays hatched, windows in
    or before which a question was asked marked above, those that are in no episode yet grey, below.

    path: its suffix says the format (.png, .pdf, .svg). ValueError before the first compaction, when there are no episodes;
    Unsupported: matplotlib is not installed.
    """
    history = conversation._history
    if history.topics is None:
        raise ValueError("picture: no episodes yet, all that was said is seen by every question")
    try:
        figures: Any = import_module("matplotlib.figure")
    except ImportError as error:
        raise Unsupported("picture: matplotlib is not installed; pip install kvstrata[plot]") from error
    labels, strays = history.topics.labels.tolist(), set(history.topics.strays)
    ends = [max(w.turns, default=-1) for w in history.windows]
    questions = [t for t, turn in enumerate(history.turns) if turn.speaker == USER]
    asked = sorted({min(bisect_left(ends, t), len(ends) - 1) for t in questions})
    names = [f"{e}: {episode.label}" for e, episode in enumerate(conversation.episodes)]
    figure = figures.Figure(figsize=(10, 1.6 + 0.42 * (len(names) + 1)), layout="constrained")
    axes = figure.subplots()
    for k in range(len(history.windows)):
        e = labels[k] if k < len(labels) else -1
        axes.add_patch(_cell(k, e, k in strays))
    axes.plot([k + 0.5 for k in asked], [len(names) - 0.2] * len(asked), "v", color="black", markersize=4)
    lanes = [*range(len(names)), -1] if len(labels) < len(history.windows) else [*range(len(names))]
    axes.set_yticks(lanes, [names[e] if e >= 0 else "not yet" for e in lanes])
    axes.set_xlim(0, len(history.windows))
    axes.set_ylim(min(lanes) - 0.6, len(names) + 0.1)
    axes.set_xlabel("window, in the order said")
    axes.set_title(f"{len(history.turns):,} turns, {len(history.windows):,} windows, {len(names)} episodes")
    axes.spines[["top", "right"]].set_visible(False)
    shown: dict[str, Any] = {"window of an episode": _cell(0, 0, False)}
    if strays:
        shown["stray, held by it"] = _cell(0, 0, True)
    if asked:
        shown["question asked"] = axes.lines[0]
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)


def _cell(window: int, episode: int, stray: bool) -> Any:
    patches: Any = import_module("matplotlib.patches")
    colour = COLOURS[episode % len(COLOURS)] if episode >= 0 else GREY
    return patches.Rectangle(
        (window, episode - LANE / 2),
        1,
        LANE,
        facecolor="white" if stray else colour,
        edgecolor=colour if stray else "white",
        hatch="////" if stray else None,
        linewidth=0.5,
    )
