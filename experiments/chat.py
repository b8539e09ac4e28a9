"""Chat on the command line: line editing, commands, answers as they are written, and the speed of each."""

import io
import logging
import sys
from typing import TYPE_CHECKING, Any

from ppow_jax import progress
from ppow_jax.errors import UserError

if TYPE_CHECKING:
    from ppow_jax.inference.model import Model

QUIT = "/quit"
HELP = f"""\
/help                  shows these lines
/reset                 forgets what was said
/speculation           shows the speculation mode; /speculation adaptive changes it
{QUIT}                  ends the chat, as the end of input does
Ctrl-C                 ends the answer; at the prompt, it ends the chat"""
_DIM, _PLAIN = "\033[2m", "\033[0m"

log = logging.getLogger(__name__)


class Chat:
    """A chat with a model: what was said so far, and how answers are decoded.

    decoding: settings of `Model.generate`.
    """

    def __init__(self, model: "Model", decoding: dict[str, Any]):
        self.model, self.decoding = model, dict(decoding)
        self.messages: list[dict[str, str]] = []
        self.at_terminal = sys.stdin.isatty()

    def run(self) -> None:
        """Answers line after line of standard input, until `/quit`, its end, or Ctrl-C at the prompt."""
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="replace")
        if self.at_terminal:
            _edit_lines()
            print(f"{self.model!r}\n/help shows the commands. The first answer takes longer: it compiles.")
        while True:
            try:
                line = self._read()
            except KeyboardInterrupt:
                print()
                return
            if line is None or line.strip() == QUIT:
                return
            if "\ufffd" in line:
                log.warning("the line is not UTF-8 text: what cannot be read is replaced by U+FFFD")
            if line.strip():
                self.take(line.strip())

    def take(self, line: str) -> None:
        """Obeys a command, or answers a message."""
        word, _, value = line.partition(" ")
        if word == "/help":
            print(HELP)
        elif word == "/reset":
            self.messages.clear()
        elif word == "/speculation":
            self._speculate(value.strip())
        elif word.startswith("/") and word[1:].isalpha():
            print(f"{word}: no such command; /help lists them")
        else:
            self.answer(line)

    def answer(self, message: str) -> None:
        """Prints the answer to a message as it is written, and its speed; Ctrl-C ends it early."""
        from ppow_jax.inference import shown

        self.messages.append({"role": "user", "content": message})
        said: list[str] = []
        prompt = self.model.chat_prompt(self.messages)
        try:
            with progress.activity("compiling", hidden=len(self.messages) > 1):
                self.model.warm_up(prompt, **self.decoding)
            pieces = self.model.stream(prompt, **self.decoding)
            for piece in pieces:
                said.append(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            self._tell("stopped")
            if not said:
                self.messages.pop()  # it was never answered
                return
        else:
            self._tell(shown.figures(pieces.result))
        self.messages.append({"role": "assistant", "content": "".join(said).strip()})

    def _speculate(self, mode: str) -> None:
        """Changes the speculation mode, or shows it."""
        try:
            if mode:
                self.decoding["speculation"] = self.model.resolve(mode)
        except UserError as error:
            print(error)
        else:
            print(f"speculation: {self.model.resolve(self.decoding.get('speculation')).mode}")

    def _read(self) -> str | None:
        """The next line; None at the end of input."""
        if not self.at_terminal:
            return sys.stdin.readline() or None
        print()
        try:
            return input("> ")
        except EOFError:
            print()
            return None

    def _tell(self, text: str) -> None:
        """Prints a line about the answer: dim below it in a terminal, otherwise to standard error."""
        print()
        if self.at_terminal and sys.stdout.isatty():
            print(f"{_DIM}[{text}]{_PLAIN}")
        else:
            print(f"[{text}]", file=sys.stderr)


def _edit_lines() -> None:
    """Lets `input` edit lines and recall earlier ones, where Python has readline."""
    try:
        import readline
    except ImportError:
        return
    readline.set_auto_history(True)
    readline.parse_and_bind("set enable-bracketed-paste on")
