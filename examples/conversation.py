"""A conversation longer than its cache, as a notebook: each `# %%` begins a cell.

Run it: python examples/conversation.py [FOLDER]. It talks with the small trained model of this repository, which knows the
codes of things that it was told and nothing else, downloads nothing and takes less than a minute. FOLDER, if given, gets the
picture of the episodes and the saved conversation.
"""

# %% A model. Yours: AutoModelForCausalLM, AutoTokenizer, and style="transcript" if the tokenizer has no chat template.
from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

from kvstrata import Conversation
from kvstrata.cli.chat import bundled
from kvstrata.episodes import Turn, picture
from kvstrata.hf import chat_model, conversation

model, tokenizer = bundled(Path(__file__).parents[1] / "bench" / "quality" / "model")
folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
folder.mkdir(parents=True, exist_ok=True)

# %% What two people said over some days: four topics, which come and go.
r = random.Random(4)
things = {"travel": "ticket hotel train map", "cooking": "soup oven plate spoon", "music": "guitar drum violin piano"}
things |= {"garden": "rose seed hedge tulip"}
codes: dict[str, str] = {}
turns: list[Turn] = []
for _ in range(24):
    topic = r.choice(list(things))
    for thing in r.sample(things[topic].split(), 2):
        name, code = f"{r.choice(['amber', 'calm', 'rusty', 'vivid'])} {thing}", f"{r.randrange(10000):04}"
        turns.append(Turn("User", f"about {topic}. The code of the {name} is {code}."))
        turns.append(Turn("Bot", f"tell me more of the {thing}."))
        codes[name] = code
print(f"{len(turns)} turns, {len(codes)} codes")

# %% A conversation within a budget: of every row, one question sees 512 tokens; 256 are read at a time.
# MiniLM tells topics apart where kvstrata[episodes] is installed; else the model's input embeddings do, with a warning.
chat = conversation(model, tokenizer, budget="512tok", chunk=256)
chat.add(turns)
chat.build()
for number, episode in enumerate(chat.episodes):
    print(f"episode {number}: {episode.label} ({episode.windows} windows, {episode.slots} slots)")

# %% Questions go to the episodes that are like them.
asked = {name.split()[1]: name for name in codes}  # of each thing the one that was new last
for name in (asked[words.split()[0]] for words in things.values()):
    question = f"What is the code of the {name}?"
    answer = chat.ask(question, max_new_tokens=8)
    read = answer.route.episodes if answer.route else "all"
    print(f"{question} {answer.text.strip()} ({codes[name]} was said; read episodes {read})")

# %% An answer as it comes, which becomes no part of the conversation.
for piece in chat.stream(f"What is the code of the {name}?", max_new_tokens=8, remember=False):
    print(piece, end="")
print()

# %% What is held: never more than the limit, however long the talk.
report = chat.report()
print(
    f"{report.turns} turns, {report.tokens:,} tokens seen; {report.near:,} bytes of at most {report.limit:,} are held,"
)
print(f"a cache of all tokens: {report.full:,}; {report.compactions} compactions, {report.switches} questions switched")

# %% The episodes over time, if matplotlib is there.
try:
    picture(chat, folder / "episodes.png")
    print(f"see {folder / 'episodes.png'}")
except ValueError as error:
    print(error)

# %% Saved, and gone on with another day.
chat.save(folder / "talk.kv")
chat.close()
chat = Conversation.load(folder / "talk.kv", chat_model(model, tokenizer))
print(chat.ask(f"What is the code of the {name}?", max_new_tokens=8).text.strip(), f"after {len(chat.turns)} turns")
chat.close()
