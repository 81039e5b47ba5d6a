"""Generated dialogues: topics with their own words take turns, and every question knows the turns that answer it.

All from (seed, number). Two people talk about four of ten topics in runs of 10 to 26 turns; windows cross the borders of
runs and sessions. Frames of sentences are common to all topics, some words belong to two, lines stray to another topic
or are small talk about none. Questions: ``single`` names the thing of one turn; ``multi`` the things of two turns of one
topic, far apart; ``vague`` words of the topic that its turn may not hold; ``across`` the things of two topics.
"""

# ruff: noqa: SIM905 (word lists read better as text)

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from kvstrata.episodes import Turn
from kvstrata.quality.dialogues import Dialogue, Question

DIALOGUES, TURNS, TOPICS_EACH = 20, 300, 4
RUN, SESSION = (10, 26), (25, 45)
"""Turns of a run, of a session: least and most."""
FACT, SMALL_TALK, STRAYING = 0.35, 0.12, 0.05
"""Shares of turns that state a fact, name no topic, name another topic's word."""
ASKED = {"single": 14, "multi": 5, "vague": 4, "across": 1}
"""Questions of a dialogue."""
TOPICS = {
    "cooking": (
        "kitchen dinner recipe cook",
        "oven broth garlic dumpling saffron skillet marinade dough whisk basil lentil pepper gravy pancake onion scale "
        "knife butter noodle stock",
    ),
    "cycling": (
        "bike ride road wheel",
        "saddle pedal helmet gravel derailleur spoke handlebar tyre brake puncture headwind climb descent jersey sprint "
        "chain gear path bell fork",
    ),
    "garden": (
        "garden plant flower grow",
        "tulip compost hedge trowel greenhouse seedling mulch rose beetle orchard lawn blossom ivy tomato soil weeds "
        "fern bed spade fork",
    ),
    "music": (
        "music concert song play",
        "cello melody violin chorus drummer tempo harmony soprano piano encore guitar trumpet metronome duet solo "
        "bridge scale note bow score",
    ),
    "school": (
        "school class teacher study",
        "lecture thesis essay algebra seminar professor homework exam semester tutor grammar chemistry pupil diploma "
        "blackboard scholarship note paper break marks",
    ),
    "sailing": (
        "boat sail sea crew",
        "mast anchor keel harbor rudder jib tide lighthouse regatta buoy deck spinnaker reef dinghy mooring gale knot "
        "bow bridge rope",
    ),
    "football": (
        "football game team goal",
        "goalkeeper penalty striker stadium referee offside dribble midfield corner defender tackle trophy coach "
        "kickoff header derby pitch bench transfer score",
    ),
    "money": (
        "money bank pay account",
        "mortgage pension invoice dividend loan interest rent tax wallet refund broker insurance salary deposit receipt "
        "budget stock balance transfer fund",
    ),
    "doctor": (
        "doctor hospital pain medicine",
        "fever clinic bandage allergy vaccine dentist surgeon ankle migraine therapy cough nurse ointment checkup "
        "tablet pulse blood scale balance break",
    ),
    "camping": (
        "camp hike forest mountain",
        "tent campfire backpack lantern trail mosquito ridge waterfall compass hammock stove ranger marshmallow valley "
        "canoe summit blanket rope path bear",
    ),
}
"""Per topic: the words that many of its turns hold, and its things, the first ones named most often."""
SPEAKERS = "Ada Bo Cleo Dan Edith Finn Gita Hugo Ines Jon Kira Lev".split()
FACTS = (
    "I finally sorted out the {0} for the {core}, and the {1} too, it took {n} days.",
    "Guess what, the {0} cost me {n} euros, and the {1} was even worse, so much for the {core}.",
    "My cousin says that the {0} goes with the {1}, she tried it {n} times.",
    "We talked about the {0} for {n} hours yesterday, then {core} again, mostly because of the {1}.",
    "After the {1} I had to look for the {0}, number {n} on my {core} list.",
)
TALK = (
    "Really? I never thought much of the {0}, but the {1} is something else.",
    "That reminds me of the {0} last year, and of the {core}, do you remember?",
    "Same here, first the {0}, then the {core}, then nothing for weeks.",
    "I would rather have the {0} than the {1}, if I am honest, {core} or no {core}.",
    "How did it go with the {0} in the end, with the {core} and all that?",
    "The {0} again! You should write a book about {core}.",
)
TAILS = (
    "Between {core} and {other} it never stops.",
    "No {core} without {other}, as they say.",
    "It is the {0} of all {core}, with some {other}.",
)
SMALL = (
    "Ha, that is so true.",
    "How was your week otherwise?",
    "I know what you mean, I felt the same about it last year.",
    "Sorry, I had to take a call. Where were we?",
    "That sounds great, tell me more when you have time.",
    "My cousin says hello, by the way.",
)
SINGLE = (
    "What did {who} say about the {0} and the {1}?",
    "When {who} told us about the {0}, what was that with the {core}?",
    "Which number did {who} name for the {0}, and what of the {1}?",
)
MULTI = (
    "What do we know of the {0} and, another time, of the {1}?",
    "Was it more for the {0} or for the {1}, in all that {core}?",
)
VAGUE = (
    "Do you remember the thing that {who} said a while ago, it had to do with {core} and all that?",
    "What was that again, the story from last year with the {0} in it, or was it the {1}?",
)
ACROSS = ("Did {who} speak more of the {0}, or of the {1}?",)


@dataclass
class Told:
    """What has been said so far. facts: per topic, (turn, the two things named)."""

    turns: list[Turn] = field(default_factory=list)
    facts: dict[str, list[tuple[int, tuple[str, str]]]] = field(default_factory=dict)


def dialogues(seed: int, n: int = DIALOGUES) -> list[Dialogue]:
    """The first n dialogues of a seed."""
    return [dialogue(seed, i) for i in range(n)]


def dialogue(seed: int, number: int) -> Dialogue:
    """One dialogue; its id is ``s<seed>-<number>``."""
    name = f"s{seed}-{number:02}"
    rng = random.Random(name)  # a string seeds by its digest, the same in every process
    topics = rng.sample(sorted(TOPICS), TOPICS_EACH)
    speakers = rng.sample(SPEAKERS, 2)
    told = Told(facts={topic: [] for topic in topics})
    for topic in _order(rng, topics):
        if len(told.turns) == TURNS:
            break
        for _ in range(min(rng.randint(*RUN), TURNS - len(told.turns))):
            _say(rng, told, topic, topics, speakers)
    sessions = [0]
    while (start := sessions[-1] + rng.randint(*SESSION)) < TURNS - SESSION[0]:
        sessions.append(start)
    return Dialogue(name, tuple(told.turns), tuple(sessions), tuple(_ask(rng, name, told, topics)))


def _order(rng: random.Random, topics: Sequence[str]) -> Iterator[str]:
    """Round after round of all topics, each in an order of its own, none twice in a row."""
    last = ""
    while True:
        one = rng.sample(topics, len(topics))
        if one[0] == last:
            one.reverse()
        yield from one
        last = one[-1]


def _say(rng: random.Random, told: Told, topic: str, topics: Sequence[str], speakers: Sequence[str]) -> None:
    number = len(told.turns)
    drawn = rng.random()
    about, things = topic, _things(rng, topic)
    if drawn < FACT:
        frame = rng.choice(FACTS)
        told.facts[topic].append((number, things))
    elif drawn < FACT + SMALL_TALK:
        frame = rng.choice(SMALL)
    else:
        frame = rng.choice(TALK)
        if rng.random() < STRAYING:
            about = rng.choice([t for t in topics if t != topic])
            things = _things(rng, about)
    if frame not in SMALL:
        frame = f"{frame} {rng.choice(TAILS)}"
    core, other = rng.sample(TOPICS[about][0].split(), 2)
    text = frame.format(*things, core=core, other=other, n=rng.randint(2, 90))
    told.turns.append(Turn(speakers[number % 2], text, id=str(number)))


def _things(rng: random.Random, topic: str) -> tuple[str, str]:
    """Two of the topic's things, the one at place i as often as 1 / (i + 4)."""
    known = TOPICS[topic][1].split()
    weights = [1 / (i + 4) for i in range(len(known))]
    first = second = rng.choices(known, weights)[0]
    while second == first:
        second = rng.choices(known, weights)[0]
    return first, second


def _core(rng: random.Random, topic: str) -> str:
    return rng.choice(TOPICS[topic][0].split())


def _ask(rng: random.Random, name: str, told: Told, topics: Sequence[str]) -> list[Question]:
    asked: list[Question] = []
    for category, count in ASKED.items():
        for _ in range(count):
            text, evidence = _QUESTIONS[category](rng, told, topics)
            asked.append(Question(f"{name}/{len(asked)}", text, category, tuple(sorted(evidence))))
    return asked


Asked = tuple[str, set[int]]


def _single(rng: random.Random, told: Told, topics: Sequence[str]) -> Asked:
    topic = rng.choice(topics)
    turn, things = rng.choice(told.facts[topic])
    text = rng.choice(SINGLE).format(*things, core=_core(rng, topic), who=told.turns[turn].speaker)
    return text, {turn}


def _multi(rng: random.Random, told: Told, topics: Sequence[str]) -> Asked:
    """Of the first and the last third of a topic's facts."""
    topic = rng.choice(topics)
    facts = told.facts[topic]
    third = max(1, len(facts) // 3)
    first, last = rng.choice(facts[:third]), rng.choice(facts[-third:])
    text = rng.choice(MULTI).format(first[1][0], last[1][0], core=_core(rng, topic))
    return text, {first[0], last[0]}


def _vague(rng: random.Random, told: Told, topics: Sequence[str]) -> Asked:
    topic = rng.choice(topics)
    turn, things = rng.choice(told.facts[topic])
    others = [w for w in TOPICS[topic][1].split() if w not in things]
    who, core = told.turns[turn].speaker, _core(rng, topic)
    return rng.choice(VAGUE).format(*rng.sample(others, 2), core=core, who=who), {turn}


def _across(rng: random.Random, told: Told, topics: Sequence[str]) -> Asked:
    one, other = (rng.choice(told.facts[topic]) for topic in rng.sample(topics, 2))
    text = rng.choice(ACROSS).format(one[1][0], other[1][0], who=told.turns[one[0]].speaker)
    return text, {one[0], other[0]}


_QUESTIONS = {"single": _single, "multi": _multi, "vague": _vague, "across": _across}
