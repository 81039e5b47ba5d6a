"""How conversations are written: the template's own rendering, turn by turn, or lines of one message."""

from __future__ import annotations

import pytest
import talk
from talk import tokenizer

from kvstrata.cli.text import ByteTokenizer
from kvstrata.config import Unsupported
from kvstrata.episodes import Turn
from kvstrata.hf.spelling import Spelling
from kvstrata.hf.writers import ChatWriter, LineWriter

TALK = [
    Turn("user", "Where is the key?"),
    Turn("assistant", "In the drawer."),
    Turn("user", "Thanks. Thé end.\n\nReally."),
    Turn("assistant", "Any time."),
]
SYSTEM = "You are Ada's assistant."
GOOD = {"chatml": talk.CHATML, "trims": talk.TRIMS, "preset": talk.PRESET, "folds": talk.FOLDS}


def chat(template, system=None, assistant="assistant"):
    return ChatWriter(Spelling(tokenizer(template)), system, assistant)


def messages(turns, system=None):
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": t.speaker, "content": t.text} for t in turns]


@pytest.mark.parametrize("system", [None, SYSTEM])
@pytest.mark.parametrize("name", GOOD)
def test_turns_are_the_templates_own_rendering(name, system):
    words, writer = tokenizer(GOOD[name]), chat(GOOD[name], system)
    for n in range(1, 5):
        prompt = n % 2 == 1
        ids, offsets = writer.tokens(TALK[:n], first=True, answer=prompt)
        whole = words.apply_chat_template(messages(TALK[:n], system), tokenize=False, add_generation_prompt=prompt)
        assert ids.tolist() == words.encode(whole, add_special_tokens=False)
        assert offsets.tolist() == sorted(offsets.tolist()) and len(offsets) == n + 1
        assert offsets[-1] == len(ids) - (len(writer.prompt) if prompt else 0)
        for turn, start, end in zip(TALK, offsets, offsets[1:], strict=False):
            text = words.decode(ids[start:end])
            assert turn.text in text and not any(other.text in text for other in TALK if other is not turn)
        before = words.decode(ids[: offsets[0]])
        assert (system in before) if system else ("Where" not in before)


@pytest.mark.parametrize("name", GOOD)
def test_in_parts_or_at_once_the_ids_are_the_same(name):
    writer = chat(GOOD[name], SYSTEM)
    whole, _ = writer.tokens(TALK, first=True, answer=True)
    parts = [writer.tokens(TALK[:1], first=True, answer=False)[0].tolist()]
    parts += [writer.tokens([turn], first=False, answer=False)[0].tolist() for turn in TALK[1:]]
    parts += [writer.tokens([], first=False, answer=True)[0].tolist()]
    assert sum(parts, []) == whole.tolist()
    assert writer.tokens([], first=True, answer=False)[0].tolist() == parts[0][: len(writer.opening)]


@pytest.mark.parametrize("name", GOOD)
def test_an_answer_and_its_closing_are_a_turn_of_the_assistant(name):
    words, writer = tokenizer(GOOD[name]), chat(GOOD[name])
    asked, _ = writer.tokens(TALK[:1], first=True, answer=True)
    answer = words.encode(TALK[1].text, add_special_tokens=False)
    assert asked.tolist() + answer + writer.closing == writer.tokens(TALK[:2], first=True, answer=False)[0].tolist()
    assert writer.stops == {words.convert_tokens_to_ids("<|end|>")}


def test_speakers_dates_and_captions_in_chat():
    words = tokenizer(talk.CHATML)
    writer = chat(talk.CHATML, assistant="Bo")

    def said(*turn, **more):
        return words.decode(writer.tokens([Turn(*turn, **more)], first=False, answer=False)[0])

    assert said("Ada", "Hi.") == "<|start|>user\nAda: Hi.<|end|>\n"
    assert said("user", "Hi.") == "<|start|>user\nHi.<|end|>\n"
    assert said("Bo", "Hi.") == said("assistant", "Hi.") == "<|start|>assistant\nHi.<|end|>\n"
    assert said("system", "Hi.") == "<|start|>system\nHi.<|end|>\n"
    assert said("Ada", "Hi.", date="2024-05-08", caption="a cat") == (
        "<|start|>user\n[2024-05-08] Ada: Hi. (image: a cat)<|end|>\n"
    )
    assert said("user", "Hi.", date="May", caption="a cat") == "<|start|>user\n[May] Hi. (image: a cat)<|end|>\n"


@pytest.mark.parametrize("name", ["chatml", "trims", "preset"])
def test_a_system_turn_first_is_the_conversations_system_text(name):
    given, _ = chat(GOOD[name], SYSTEM).tokens(TALK, first=True, answer=False)
    ids, offsets = chat(GOOD[name]).tokens([Turn("system", SYSTEM), *TALK], first=True, answer=False)
    assert ids.tolist() == given.tolist() and offsets[0] == 0


def test_roles_that_alternate_do_not_bind_turns():
    """Two speakers after each other are both users, whatever the template says of whole conversations."""
    writer, words = chat(talk.FOLDS), tokenizer(talk.FOLDS)
    ids, offsets = writer.tokens([Turn("Ada", "Hi."), Turn("Cy", "Ho.")], first=True, answer=False)
    assert words.decode(ids) == "<s><|start|>user\nAda: Hi.<|end|>\n<|start|>user\nCy: Ho.<|end|>\n"
    with pytest.raises(ValueError, match=r"turns\[0\] cannot be written: .*assistant cannot be first"):
        chat(talk.FOLDS, SYSTEM).tokens(TALK[1:], first=True, answer=False)
    with pytest.raises(ValueError, match=r"turns\[0\] cannot be written: .*give it as system="):
        writer.tokens([Turn("system", SYSTEM)], first=True, answer=False)
    with pytest.raises(ValueError, match=r"turns\[1\] cannot be written: .*alternate"):
        writer.tokens([TALK[0], Turn("system", SYSTEM)], first=True, answer=False)


@pytest.mark.parametrize(
    ("template", "system", "message"),
    [
        (talk.THINKS, None, r"turns\[:2\] is no prefix of turns\[:3\]"),
        (talk.LATE_SYSTEM, SYSTEM, r"turns\[:1\] is no prefix of turns\[:2\]"),
        (talk.NO_SYSTEM, SYSTEM, "does not take system, user.*no system role"),
        (talk.COUNTS, None, "depend on its place"),
    ],
)
def test_templates_that_cannot_be_extended(template, system, message):
    with pytest.raises(Unsupported, match=f"(?s){message}.*style='transcript'"):
        chat(template, system)


@pytest.mark.parametrize("write", [ChatWriter, LineWriter])
@pytest.mark.parametrize(("template", "message"), [(talk.MELTS, "joins"), (talk.TWICE, "writes a text 2 times")])
def test_templates_that_cannot_be_cut(write, template, message):
    with pytest.raises(Unsupported, match=message):
        write(Spelling(tokenizer(template)), None, "assistant")


# --- lines ----------------------------------------------------------------------------------------------------------------

LINES = [
    Turn("Ada", "Moved.", date="2024-05-08", caption="a house"),
    Turn("Bo", "Nice!\nReally."),
    Turn("user", "When?"),
]
TEXT = "[2024-05-08] Ada: Moved. (image: a house)\nBo: Nice!\nReally.\nuser: When?\n"


@pytest.mark.parametrize("name", [*GOOD, "thinks"])
def test_a_transcript_is_one_user_message(name):
    template = {**GOOD, "thinks": talk.THINKS}[name]
    words = tokenizer(template)
    writer = LineWriter(Spelling(words), SYSTEM, "assistant")
    ids, offsets = writer.tokens(LINES, first=True, answer=True)
    marked = words.apply_chat_template(
        [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "MARK"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert words.decode(ids) == marked.replace("MARK", TEXT)
    texts = [words.decode(ids[a:b]) for a, b in zip(offsets, offsets[1:], strict=False)]
    assert texts == [TEXT[:42], "Bo: Nice!\nReally.\n", "user: When?\n"]
    parts = [writer.tokens([t], first=i == 0, answer=False)[0].tolist() for i, t in enumerate(LINES)]
    assert sum(parts, []) + writer.prompt == ids.tolist()
    assert writer.closing == [] and writer.stops == {words.convert_tokens_to_ids("<|end|>")}


def test_a_system_text_without_a_role_stands_before_the_lines():
    words = tokenizer(talk.NO_SYSTEM)
    ids, offsets = LineWriter(Spelling(words), SYSTEM, "assistant").tokens(LINES, first=True, answer=False)
    assert words.decode(ids) == f"<|start|>user\n{SYSTEM}\n\n{TEXT}"
    assert words.decode(ids[: offsets[0]]) == f"<|start|>user\n{SYSTEM}\n\n"


def test_a_transcript_without_a_template_is_lines():
    words = tokenizer()
    writer = LineWriter(Spelling(words), SYSTEM, "Bo")
    ids, offsets = writer.tokens(LINES, first=True, answer=True)
    assert words.decode(ids) == f"<s>{SYSTEM}\n\n{TEXT}Bo:"
    assert ids[0] == words.bos_token_id and int((ids == words.bos_token_id).sum()) == 1
    assert writer.stops == {i for i in range(len(words)) if "\n" in words.decode([i])} and len(writer.stops) == 3
    writer = LineWriter(Spelling(ByteTokenizer()), None, "Bo")
    ids, offsets = writer.tokens(LINES, first=True, answer=True)
    assert bytes(ids.tolist()).decode() == f"{TEXT}Bo:"
    assert offsets.tolist() == [0, 42, 60, 72] and writer.stops == {10}
