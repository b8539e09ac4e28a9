"""The chat's commands and its answers, with a model that only repeats."""

import io
import sys
import types

import pytest

from experiments.chat import HELP, Chat
from ppow_jax.errors import UserError
from ppow_jax.inference.requests import Result, Stats


class Echo:
    """Answers with the last message; `interrupt` raises Ctrl-C after that number of pieces."""

    def __init__(self):
        self.asked, self.modes, self.compiled, self.interrupt = [], [], [], None

    def chat_prompt(self, messages):
        self.asked.append([(message["role"], message["content"]) for message in messages])
        return messages[-1]["content"]

    def resolve(self, speculation):
        if isinstance(speculation, types.SimpleNamespace):
            return speculation
        if speculation not in (None, "chain", "adaptive"):
            raise UserError(f"speculation={speculation}: must be one of chain, adaptive")
        return types.SimpleNamespace(mode=speculation or "chain")

    def warm_up(self, prompt, **decoding):
        self.compiled.append((prompt, decoding))

    def stream(self, prompt, **decoding):
        assert self.compiled[-1] == (prompt, decoding)  # so that no compilation counts for the speed
        self.modes.append(decoding.get("speculation"))
        return Pieces(prompt, self.interrupt)


class Pieces:
    def __init__(self, prompt, interrupt):
        self._words, self._interrupt, self._count = iter(prompt.split(" ")), interrupt, 0
        self.result = Result(prompt, [1, 2, 3], "stop", [], Stats.of([0, 1], 2), 0.1, 0.5)

    def __iter__(self):
        return self

    def __next__(self):
        if self._count == self._interrupt:
            raise KeyboardInterrupt
        self._count += 1
        return next(self._words)


@pytest.fixture
def chat(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    return Chat(Echo(), {"max_new_tokens": 8})


def test_an_answer_and_its_speed(chat, capsys):
    chat.take("one two")
    out, err = capsys.readouterr()
    said = err.strip().splitlines()[-1]  # after a line on compiling, where log lines are shown
    assert out == "onetwo\n" and said == "[3 tokens, 4.0 token/s, tau 2.00, 1 of 2 drafted tokens accepted]"
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]


def test_commands(chat, capsys):
    chat.take("/help")
    assert capsys.readouterr().out == HELP + "\n"
    chat.take("/speculation adaptive")
    assert capsys.readouterr().out == "speculation: adaptive\n"
    chat.take("/speculation trees")
    assert "trees: must be one of chain, adaptive" in capsys.readouterr().out
    chat.take("hello")
    assert chat.model.modes[-1].mode == "adaptive" and chat.model.asked[-1] == [("user", "hello")]
    chat.take("/reset")
    chat.take("again")
    assert chat.model.asked[-1] == [("user", "again")]
    capsys.readouterr()
    chat.take("/nonsense")
    assert capsys.readouterr().out == "/nonsense: no such command; /help lists them\n"
    chat.take("/etc/passwd holds what?")  # no command
    assert chat.model.asked[-1][-1] == ("user", "/etc/passwd holds what?")


@pytest.mark.parametrize(("pieces", "kept"), [(0, []), (1, [("user", "a b c"), ("assistant", "a")])])
def test_an_interrupt_ends_the_answer_only(chat, capsys, pieces, kept):
    chat.model.interrupt = pieces
    chat.take("a b c")
    assert capsys.readouterr().err.endswith("[stopped]\n")
    assert [(message["role"], message["content"]) for message in chat.messages] == kept
    chat.model.interrupt = None
    chat.take("d")
    assert chat.model.asked[-1] == [*kept, ("user", "d")]


def test_an_interrupt_at_the_prompt_ends_the_chat(chat, monkeypatch, capsys):
    lines = iter(["one", KeyboardInterrupt, "never"])

    def read(prompt):
        assert prompt == "> "
        if (line := next(lines)) is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line

    chat.at_terminal = True
    monkeypatch.setattr("builtins.input", read)
    chat.run()
    assert len(chat.model.asked) == 1 and "/help shows the commands" in capsys.readouterr().out
