"""Talk with a model, for as long as you like, within a cache of fixed size.

MODEL is a folder, else a hub id; "bundled" is the trained model of a checkout, bench/quality/model, where it is run from
the root of one: it knows the codes of things that it was told, and nothing else. Answers come as they are generated; Ctrl-C
stops one and keeps its words. /help lists the commands. Where the input is no terminal, each of its lines is a question or
a command, and the exit code is 1 if one of them failed.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvstrata.cli.demo import MODEL
from kvstrata.cli.generate import budget_text, positive
from kvstrata.cli.output import Output, bytes_text

if TYPE_CHECKING:
    from kvstrata.episodes import Conversation, Embedder, Turn
    from kvstrata.hf.chat_model import Style

BUNDLED = "bundled"
BUDGET = "4096tok"
# The bundled model was trained on lines: what is said, and "Q: code of the amber fox:" with the answer behind it.
LINES = (
    "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content | trim }}\n"
    "{% elif m.content[-1] in '?:' %}Q: {{ m.content[:-1] | replace('What is the ', '') }}:"
    "{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
)


def conversation_budget(text: str) -> str:
    from kvstrata.budget import Budget

    parsed = Budget.parse(budget_text(text))
    if parsed is None or parsed.unit == "share":
        raise argparse.ArgumentTypeError(f'{text!r} is no budget of a conversation, expected "2GiB" or "4096tok"')
    return text


def turns_text(path: str) -> list[Turn]:
    """Of a file with one turn a line: {"speaker": ..., "text": ..., "date": ...}."""
    from kvstrata.episodes import turns_of

    found: list[Turn] = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{path}: {error}") from None
    for number, line in enumerate(lines, 1):
        try:
            found += turns_of([json.loads(line)] if line.strip() else [])
        except ValueError as error:  # of JSON, or of a turn
            reason = str(error).removeprefix("turns[0]: ")
            raise argparse.ArgumentTypeError(f"{path}, line {number}: {reason}") from None
    return found


def spoken(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("blank, expected a text")
    return text


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--budget", metavar="B", type=conversation_budget, help='"2GiB" or "4096tok"; default: ' + BUDGET
    )
    start.add_argument("--load", metavar="DIR", help="go on with what /save wrote, under its settings")
    parser.add_argument("--system", metavar="TEXT", type=spoken, help="what stands before all that is said")
    parser.add_argument(
        "--style",
        choices=("chat", "transcript"),
        help="by the tokenizer's chat template, or as lines; default: chat where there is a template",
    )
    parser.add_argument(
        "--history",
        metavar="FILE",
        type=turns_text,
        default=[],
        help='turns said before, as JSON lines: "speaker", "text"',
    )
    parser.add_argument("--max-new-tokens", metavar="N", type=positive, help="default: 256, at most half a chunk")
    parser.add_argument(
        "--chunk", metavar="N", type=positive, help="tokens read at a time; default: half of the budget"
    )
    parser.add_argument(
        "--embedder",
        choices=("auto", "minilm", "input"),
        default="auto",
        help="what tells topics apart: MiniLM, or the model's input embeddings; default: MiniLM where it is installed",
    )


def run(args: argparse.Namespace, out: Output) -> int:
    from kvstrata.cli.talk import Talk, Watched
    from kvstrata.hf import chat_model

    model, tokenizer, template = _loaded(args.model, out)
    style: Style = args.style or ("chat" if template else "transcript")
    if style == "transcript" and _is_bundled(args.model):
        out.warn(
            "the bundled model was trained on other lines, and answers at random here; it is asked in them without --style"
        )
    watched: Any = Watched(chat_model(model, tokenizer, style=style, system=args.system))
    embedder = _embedder(args.embedder, watched, out)
    make = _maker(args, watched, embedder)
    if args.load:
        from kvstrata.episodes import Conversation

        with out.busy(f"loading {args.load}"):
            chat = Conversation.load(args.load, watched, embedder=embedder)
    else:
        chat = make(args.budget or BUDGET)
    talk = Talk(chat, watched, make, out, args.max_new_tokens, args.load or "")
    talk.chat.add(args.history)
    _greet(args.model, style, talk.chat, out)
    return talk.run(args.model)


def bundled(folder: Path = MODEL) -> tuple[Any, Any]:
    """(model, tokenizer) of the trained model of a checkout, with a chat template: what is said is a line, and a line that
    ends with "?" or ":" is a question, answered behind it. ValueError where it is not there."""
    from kvstrata.hf.load import load

    if not (folder / "model.safetensors").is_file():
        raise ValueError(
            f"model: {BUNDLED!r} is {folder} of a checkout, which is not here; run it from the root of one"
        )
    model, tokenizer = load(str(folder))
    assert tokenizer is not None
    tokenizer.chat_template = LINES
    model.generation_config.eos_token_id = [i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])]
    return model, tokenizer


def _is_bundled(name: str) -> bool:
    return name == BUNDLED or Path(name).resolve() == MODEL.resolve()


def _loaded(name: str, out: Output) -> tuple[Any, Any, bool]:
    """(model, tokenizer, whether it has a chat template)."""
    from kvstrata.cli.text import ByteTokenizer
    from kvstrata.hf.load import load

    with out.busy(f"loading {name}"):
        model, tokenizer = bundled() if _is_bundled(name) else load(name)
    tokenizer = tokenizer or ByteTokenizer()
    return model, tokenizer, getattr(tokenizer, "chat_template", None) is not None


def _embedder(name: str, model: Any, out: Output) -> Embedder:
    from kvstrata.episodes import InputEmbedding, MiniLM, auto

    if name == "input":
        return InputEmbedding(model.embeddings, model.plain)
    with out.busy("loading MiniLM"), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        found = MiniLM() if name == "minilm" else auto(model.embeddings, model.plain)
    for warning in said:
        out.warn(str(warning.message))
    return found


def _maker(args: argparse.Namespace, model: Any, embedder: Embedder) -> Callable[[str], Conversation]:
    from kvstrata.episodes import Conversation

    return lambda budget: Conversation(model, budget, chunk=args.chunk, embedder=embedder)


def _greet(name: str, style: str, chat: Conversation, out: Output) -> None:
    report = chat.report()
    out.line(
        f"{name}, style {style}, topics by {report.embedder}. All is kept up to {report.whole:,} tokens;"
        f" beyond, a question sees {report.budget:,}. The cache takes at most {bytes_text(report.limit)}."
    )
    if report.turns:
        out.line(f"{report.turns:,} turns were said before, {report.unread:,} tokens to read.")
    out.line("/help lists the commands, /quit ends.", style="dim")
