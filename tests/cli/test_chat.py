"""`kvstrata chat` over lines of a file and at a terminal: answers arrive, commands say what they did, limits hold."""

from __future__ import annotations

import builtins
import io
import json
import os
import random
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Run, runner
from talk import CHATML, MARKS, tokenizer
from topics import TOPICS, CountedWords
from topics import talk as said_of_topics

from kvstrata import Conversation
from kvstrata.cli import chat as command
from kvstrata.cli.output import Output
from kvstrata.cli.talk import Watched

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--budget", "256tok", "--chunk", "128", "--embedder", "input", "--max-new-tokens", "6")


@pytest.fixture
def chat(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command `kvstrata chat`."""
    return partial(runner(capsys, monkeypatch), "chat")


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama and a tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("talker")
    tokens = tokenizer(CHATML)
    shape: dict[str, Any] = {"vocab_size": len(tokens), "hidden_size": 64, "intermediate_size": 32, "head_dim": 32}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}
    shape |= {"bos_token_id": None, "eos_token_id": None}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        config = transformers.LlamaConfig(**shape, max_position_embeddings=1 << 16)
        model = transformers.LlamaForCausalLM(config)
        model.lm_head.weight[tokens.convert_tokens_to_ids(list(MARKS))] = 0  # no mark is ever the likeliest
        model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty turns of four topics."""
    file = tmp_path_factory.mktemp("said") / "talk.jsonl"
    lines = [json.dumps({"speaker": t.speaker, "text": t.text}) for t in said_of_topics(40, seed=1)]
    file.write_text("\n".join([*lines, ""]))
    return file


def questions(count: int) -> str:
    r = random.Random(5)
    asked = [f"{' '.join(r.sample(TOPICS[topic].split(), 3))}?" for topic in list(TOPICS)[:4] * count]
    return "\n".join(asked[:count]) + "\n"


def test_twenty_questions_under_a_budget_that_makes_them_switch(
    chat: Run, talker: Path, history: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_embedder", lambda *_: CountedWords())  # a random model's own tell little apart
    done = chat(talker, *SMALL, "--history", history, "--json", lines=questions(20))
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert [a["question"] for a in said["answers"]] == questions(20).splitlines()
    assert all(a["tokens"] > 0 and a["text"] and a["episodes"] for a in said["answers"])
    report = said["report"]
    assert report["turns"] == 40 + 2 * 20 and report["questions"] == 20
    assert report["switches"] > 5 and report["compactions"] > 5
    assert report["near"] <= report["peak"] <= report["limit"] < report["full"]


def test_what_is_printed_can_be_read(chat: Run, talker: Path, history: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "episodes.png"
    lines = f"{questions(2)}/report\n/episodes\n/episodes {file}\n/help\n/quit\nnever asked\n"
    done = chat(talker, *SMALL, "--history", history, "--system", "Be kind.", lines=lines)
    assert done.returncode == 0, done.stderr
    first = questions(2).splitlines()[0]
    answer = done.stdout.index(f"> {first}\n") + len(first) + 3
    assert done.stdout[answer:].split("\n")[0].strip()
    assert "tokens, saw episode" in done.stdout and "never asked" not in done.stdout
    for part in ("near bytes", "limit", "compactions", "read last", "/budget NEW", f"Picture: {file}"):
        assert part in done.stdout
    assert set(TOPICS["sea"].split()) & set(done.stdout.replace(",", " ").split())  # a label
    assert file.read_bytes().startswith(b"\x89PNG")
    assert "\x1b" not in done.stdout + done.stderr and not set("─│━┃┌┏╭╮") & set(done.stdout)


def test_while_all_is_kept_there_are_no_episodes(chat: Run, talker: Path, tmp_path: Path) -> None:
    done = chat(talker, *SMALL, lines=f"/episodes {tmp_path / 'e.png'}\nHello there.\n/report\n")
    assert done.returncode == 0, done.stderr
    assert "No episodes yet: all is seen, up to 336 tokens; there are 0." in done.stdout
    assert "saw all that was said" in done.stdout


def test_another_budget_reads_all_again(chat: Run, talker: Path, history: Path, tmp_path: Path) -> None:
    """And is saved where it was before."""
    first, refreshes = f"{questions(2)}/save {tmp_path / 'one'}\n", f"/refresh\n/refresh rebuild\n{questions(1)}"
    lines = f"{first}/budget 384tok\n{questions(1)}/save\n{refreshes}"
    done = chat(talker, *SMALL, "--history", history, lines=lines)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tokens again, which may take long.") == 2
    assert "All is kept up to 336 tokens; beyond, a question sees 256." in done.stdout
    said = json.loads(chat(talker, *SMALL, "--history", history, "--json", lines=lines.replace("one", "two")).stdout)
    done = chat("--load", tmp_path / "two", talker, *SMALL[4:], "--json", lines="/report\n")
    assert json.loads(done.stdout)["report"]["budget"] == 384, done.stderr
    assert len(said["answers"]) == 4 and said["report"]["budget"] == 384 and said["report"]["turns"] == 48


def test_a_saved_talk_goes_on(chat: Run, talker: Path, history: Path, tmp_path: Path) -> None:
    """Answers are those of one that was never saved."""
    first, second = questions(2).splitlines(keepends=True)
    whole = json.loads(chat(talker, *SMALL, "--history", history, "--json", lines=first + second).stdout)
    folder = tmp_path / "ada.kv"
    done = chat(talker, *SMALL, "--history", history, lines=f"{first}/save {folder}\n")
    assert done.returncode == 0 and f"Saved in {folder}" in done.stdout, done.stderr
    loaded = ("--load", folder, *SMALL[4:])
    done = chat(talker, *loaded, "--json", lines=f"{second}/save\n")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["answers"][0]["text"] == whole["answers"][1]["text"]
    assert json.loads(done.stdout)["report"]["turns"] == whole["report"]["turns"]
    assert "/save: nothing given" in chat(talker, *SMALL, lines="/save\n").stderr
    done = chat(talker, "--load", tmp_path / "none", *SMALL[4:])
    assert done.returncode == 1 and str(tmp_path / "none") in done.stderr


def test_the_talk_goes_on_after_what_fails(chat: Run, talker: Path, tmp_path: Path) -> None:
    lines = f"/nope\n/budget\n/budget 25%\n/budget 16tok\n/refresh all\n{'x' * 300}\nHello there.\n"
    done = chat(talker, *SMALL, "--style", "transcript", lines=lines)
    assert done.returncode == 1
    said = done.stderr.splitlines()
    for line in (
        "/nope is unknown; /help lists the commands",
        "/budget: nothing given",
        "a conversation takes bytes or tokens",
        "refresh: 'all' is unknown",
        "in style 'transcript', expected at most the 128 of a chunk",
    ):
        assert any(line in told for told in said), line
    assert len([told for told in said if told.startswith("kvstrata: ")]) == 6
    assert "saw all that was said" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "the following arguments are required: MODEL"),
        (("m", "--budget", "25%"), "is no budget of a conversation"),
        (("m", "--budget", "2 pounds"), "argument --budget"),
        (("m", "--budget", "256tok", "--load", "x"), "not allowed with argument --budget"),
        (("m", "--system", " "), "blank, expected a text"),
        (("m", "--max-new-tokens", "0"), "at least 1"),
        (("m", "--embedder", "best"), "invalid choice"),
        (("m", "--history", "none.jsonl"), "none.jsonl"),
    ],
)
def test_bad_usage_exits_2(chat: Run, arguments: tuple[str, ...], reason: str) -> None:
    done = chat(*arguments)
    assert done.returncode == 2 and reason in done.stderr


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ("{", "line 2: Expecting"),
        ('{"speaker": "Ada", "text": " "}', "line 2: Turn: text is blank"),
        ('{"speaker": "Ada", "said": "x"}', "line 2: unknown keys"),
        ("7", "line 2: 7, expected a Turn"),
    ],
)
def test_a_bad_line_of_a_history_is_named(chat: Run, tmp_path: Path, second: str, reason: str) -> None:
    file = tmp_path / "talk.jsonl"
    file.write_text('{"speaker": "Ada", "text": "Hello."}\n' + second + "\n")
    done = chat("m", "--history", file)
    assert done.returncode == 2 and reason in done.stderr and str(file) in done.stderr


def test_what_is_found_only_later_exits_1(
    chat: Run, talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "expected" in chat(talker, "--budget", "16tok", "--embedder", "input").stderr
    assert chat(tmp_path / "none").returncode == 1
    monkeypatch.chdir(tmp_path)
    done = chat("bundled")
    assert done.returncode == 1 and "run it from the root of one" in done.stderr


def test_a_model_without_a_chat_template_writes_lines(chat: Run, model_folder: Path) -> None:
    done = chat(model_folder, *SMALL, lines="Hello there.\n")
    assert done.returncode == 0 and "style transcript" in done.stdout, done.stderr
    done = chat(model_folder, *SMALL, "--style", "chat")
    assert done.returncode == 1 and "style='transcript' works with it" in done.stderr


def test_the_bundled_model_answers(chat: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    file = tmp_path / "talk.jsonl"
    codes = {"amber ticket": "4711", "rusty soup": "0815", "noble violin": "3141"}
    turns = [{"speaker": "User", "text": f"about it. The code of the {k} is {v}."} for k, v in codes.items()]
    file.write_text("\n".join(map(json.dumps, turns)))
    lines = "".join(f"What is the code of the {k}?\n" for k in codes)
    done = chat("bundled", "--embedder", "input", "--history", file, "--json", lines=lines)
    assert done.returncode == 0, done.stderr
    assert [a["text"] for a in json.loads(done.stdout)["answers"]] == list(codes.values())


# --- What stops ----------------------------------------------------------------------------------------------------------


def test_an_interrupt_stops_an_answer_and_keeps_its_words(
    chat: Run, talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    piece, before = Output.piece, signal.getsignal(signal.SIGINT)

    def interrupted(self: Output, text: str) -> None:
        said.append(text)
        if len(said) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        piece(self, text)

    monkeypatch.setattr(Output, "piece", interrupted)
    done = chat(talker, *SMALL[:-1], "60", "--json", lines="Hello there.\nAnd now?\n")
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)["answers"]
    assert first["stopped"] and first["text"] == "".join(said[:3]).strip()
    assert not second["stopped"] and json.loads(done.stdout)["report"]["turns"] == 4
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_stops_reading_which_goes_on_later(
    chat: Run, talker: Path, history: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = 0
    forward = Watched.forward

    def interrupted(self: Watched, *args: Any, **options: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, *args, **options)

    monkeypatch.setattr(Watched, "forward", interrupted)
    done = chat(talker, *SMALL, "--history", history, "--json", lines=questions(2))
    assert done.returncode == 1 and "stopped; what was not read yet is read with the next question" in done.stderr
    said = json.loads(done.stdout)
    assert len(said["answers"]) == 1 and said["report"]["turns"] == 42
    monkeypatch.setattr(Watched, "forward", forward)
    whole = json.loads(
        chat(talker, *SMALL, "--history", history, "--json", lines=questions(2).split("\n")[1] + "\n").stdout
    )
    assert whole["report"]["tokens"] == said["report"]["tokens"]
    assert whole["answers"][0]["text"] == said["answers"][0]["text"]


def test_an_interrupt_in_the_last_pass_of_reading_asks_nothing(
    chat: Run, talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What closed the first answer is one pass: the second question is stopped, the third goes on."""
    feeds = 0
    build = Conversation.build

    def interrupted(self: Conversation) -> None:
        nonlocal feeds
        feeds += 1
        build(self)
        if feeds == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Conversation, "build", interrupted)
    done = chat(talker, *SMALL, "--json", lines="One.\nTwo.\nThree.\n")
    assert done.returncode == 1 and "stopped" in done.stderr
    said = json.loads(done.stdout)
    assert [a["question"] for a in said["answers"]] == ["One.", "Three."] and said["report"]["turns"] == 4


def test_a_terminal_asks_until_it_ends(chat: Run, talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    typed: Iterator[Any] = iter(["Hello there.", KeyboardInterrupt, "", "/nope", EOFError])

    def read(prompt: str) -> str:
        assert prompt == "> "
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(builtins, "input", read)
    monkeypatch.setattr(io, "StringIO", Terminal)
    done = chat(talker, *SMALL)
    assert done.returncode == 0, done.stderr  # at a terminal a mistake was seen already
    assert "Ctrl-D or /quit ends." in done.stdout and "saw all that was said" in done.stdout
    assert "/nope is unknown" in done.stderr
