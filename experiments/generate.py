"""Answers a prompt, or chats, with or without a drafter, and reports the speed.

    python -m experiments.generate --prompt="Why is the sky blue?" --compare
    python -m experiments.generate --chat
    python -m experiments.generate --prompt="Why is the sky blue?" --speculation=tree --trace=trace.html

A drafter for --target=smollm2-135m is included (drafters/smollm2-135m); --drafter=none selects plain decoding.
"""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from experiments.chat import QUIT, Chat
from experiments.common import DatastoreFlags, LookupFlags, ModelFlags, OnlineFlags, StoppingFlags
from ppow_jax import cli, defaults, progress
from ppow_jax.errors import UserError
from ppow_jax.flags import field, require

if TYPE_CHECKING:
    from ppow_jax.inference.model import Model, Result
    from ppow_jax.speculation.settings import Speculation


@dataclasses.dataclass(frozen=True)
class Settings(OnlineFlags, DatastoreFlags, LookupFlags, StoppingFlags, ModelFlags):
    """The flags of this program."""

    prompt: str | None = field(None, "The prompt.", group="Prompt")
    prompt_file: str | None = field(
        None, "Text file with the prompt; a line break at its end is ignored.", group="Prompt"
    )
    raw: bool = field(False, "Continue the prompt itself, without chat template.", group="Prompt")
    chat: bool = field(
        False, f"Chat: answer each line of standard input; /help shows the commands, {QUIT} ends it.", group="Prompt"
    )

    speculation: str | None = field(
        None,
        defaults.MODE_HELP,
        choices=("off", "chain", "tree", "adaptive", "ngram", "mixture"),
        group="Speculation",
    )
    window: int | None = field(None, defaults.WINDOW_HELP, low=1, high=64, group="Speculation")
    tree_branch: int | None = field(None, defaults.BRANCH_HELP, low=1, group="Speculation")
    tree_depth: int | None = field(None, defaults.DEPTH_HELP, low=1, high=64, group="Speculation")
    tree_nodes: int | None = field(None, defaults.NODES_HELP, low=1, group="Speculation")
    compare: bool = field(False, "Also use plain decoding, and compare.", group="Speculation")

    max_new_tokens: int = field(256, "Maximum number of tokens of the answer.", low=1, group="Decoding")
    temperature: float = field(0.0, "Sampling temperature; 0 is greedy.", low=0, high=100, group="Decoding")
    top_k: int = field(0, "Sample from this number of most probable tokens; 0: all tokens.", low=0, group="Decoding")
    top_p: float = field(
        1.0, "Sample from the most probable tokens that have this total probability.", high=1, group="Decoding"
    )
    seed: int = field(0, "Seed for sampling.", low=0, high=2**31 - 1, group="Decoding")
    stop: str | None = field(None, r"A text that ends the answer; \n is a line break.", group="Decoding")

    stream: bool = field(False, "Print the answer while it is generated.", group="Output")
    trace: str | None = field(None, "HTML file that shows decoding step by step.", group="Output")

    def __post_init__(self):
        super().__post_init__()
        given = (self.prompt is not None) + (self.prompt_file is not None) + self.chat
        require(given == 1, "--prompt=TEXT or --prompt_file=FILE: one of them must be given, or --chat")
        require(self.top_p > 0, f"--top_p={self.top_p}: must be above 0")
        require(self.stop != "", "--stop: must not be empty")
        for flag, others in {"chat": ("raw", "compare", "trace"), "trace": ("compare", "stream")}.items():
            for other in others:
                both = getattr(self, flag) and getattr(self, other)
                require(not both, f"--{flag}: cannot be combined with --{other}")
        without = self.speculation == "ngram"
        require(
            not self.compare or self.drafter is not None or without,
            "--compare: needs a drafter to compare with, but --drafter=none",
        )
        require(not self.compare or self.speculation != "off", "--compare: needs another mode than --speculation=off")
        is_tree, adapts = self.speculation == "tree", self.speculation in (None, "adaptive", "mixture")
        for name in ("tree_branch", "tree_nodes"):
            needs = "needs --speculation=tree, adaptive or mixture"
            require(getattr(self, name) is None or is_tree or adapts, f"--{name}={getattr(self, name)}: {needs}")
        needs = "needs --speculation=tree"
        require(self.tree_depth is None or is_tree, f"--tree_depth={self.tree_depth}: {needs}")
        if self.window is not None:
            both = f"--window={self.window} and --tree_depth={self.tree_depth}: name the levels of the tree once"
            require(self.tree_depth is None, both)
            require(not without, f"--window={self.window}: --speculation=ngram has --ngram_tokens instead")
            drafts = self.speculation != "off" and self.drafter is not None
            require(drafts, f"--window={self.window}: needs a drafter, and another mode than --speculation=off")
        plain = self.speculation in (None, "off", "ngram") or self.drafter is not None
        require(plain, f"--speculation={self.speculation}: needs a drafter, but --drafter=none")
        self.check_online(self.speculation, self.drafter)
        require(self.chat or not self.online, "--online: needs --chat, it adapts between answers")

    def sized(self, mode: str) -> "Speculation":
        """A mode with the sizes that the flags give."""
        from ppow_jax.speculation.settings import of_mode

        window = self.tree_depth or self.window or defaults.WINDOW
        branch, tokens = self.tree_branch or defaults.BRANCH, self.ngram_tokens
        return of_mode(mode, window, branch=branch, nodes=self.tree_nodes, tokens=tokens, stopping=self.stopping())

    @property
    def decoding(self) -> dict[str, Any]:
        """Arguments of `Model.generate`, without the speculation."""
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
        stop = () if self.stop is None else self.stop.replace(r"\n", "\n").replace(r"\t", "\t")
        return {name: getattr(self, name) for name in names} | {"stop": stop}


def main(settings: Settings) -> None:
    """Prints the answer, then its speed."""
    text = None if settings.chat else read_prompt(settings)
    cli.check_output("--trace", settings.trace)
    cli.keep_compiled(settings.compilation_cache)

    with settings.in_use():  # imports JAX: after the settings' checks
        _answer(settings, text)


def _answer(settings: Settings, text: str | None) -> None:
    from ppow_jax.inference.model import load
    from ppow_jax.weights import loading

    directory = loading.find_drafter(settings.drafter, settings.target)
    mode = settings.speculation or defaults.mode(directory is not None)
    compares, windows = settings.compare and mode != "ngram", bool(settings.window)
    wanted = ("compare", compares), (f"window={settings.window}", windows), ("online", settings.online)
    for flag, needed in (*wanted, (f"speculation={mode}", mode not in ("off", "ngram"))):
        missing = f"--{flag}: needs a drafter, but --target={settings.target} has none; name one: --drafter=DIR"
        require(not needed or directory is not None, missing)
    decoding = settings.decoding | {"speculation": settings.sized(mode)}
    with progress.activity(f"loading {settings.target}{' and its drafter' if directory else ''}"):
        model = load(settings.target, str(directory) if directory else None, settings.dtype)
    model.datastore = settings.open_datastore(model.target.config.vocab_size)
    try:
        _say(settings, text, model, mode, decoding)
    finally:
        if model.datastore is not None:
            model.datastore.save()


def _say(settings: Settings, text: str | None, model: "Model", mode: str, decoding: dict[str, Any]) -> None:
    from ppow_jax.inference import shown

    if settings.chat:
        if settings.online:
            with progress.activity("compiling what adapts the drafter"):
                settings.adapt(model)
        try:
            Chat(model, decoding).run()
        finally:
            if model.online is not None:
                model.online.close()
        return None

    prompt = text if settings.raw else model.chat_prompt(text)
    if settings.trace is not None:
        from ppow_jax.inference import trace

        with progress.activity("compiling, then decoding round by round"):
            traced = trace.record(model, prompt, **decoding)
        traced.write(settings.trace)
        print(f"{traced.result.text}\n\n{settings.trace}: open it in a browser")
        return None
    plain = decoding | {"speculation": "off"}
    with progress.activity("compiling"):
        model.warm_up(prompt, **decoding)
        if settings.compare:
            model.warm_up(prompt, **plain)
    result = answer(model, prompt, decoding, settings.stream, settings.compare)
    names = {"off": "without a drafter", "ngram": "with n-gram lookup", "mixture": "with drafter and n-gram lookup"}
    print(f"\n{shown.summary(result, names.get(mode, 'with the drafter'))}")
    if settings.compare:
        print(shown.comparison(model.generate(prompt, **plain)[0], result, settings.temperature))
    return None


def read_prompt(settings: Settings) -> str:
    """The prompt's text; raises UserError when there is none."""
    if settings.prompt_file is None:
        require(bool(settings.prompt.strip()), "--prompt: must not be empty")
        return settings.prompt
    try:
        text = Path(settings.prompt_file).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"--prompt_file={settings.prompt_file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"--prompt_file={settings.prompt_file}: must be a text file in UTF-8") from None
    require(bool(text.strip()), f"--prompt_file={settings.prompt_file}: is empty")
    return text.removesuffix("\n").removesuffix("\r")


def answer(model: "Model", prompt: Any, decoding: dict[str, Any], stream: bool, origin: bool = False) -> "Result":
    """Prints the answer, at once or as it is written. origin: a terminal shows which tokens were drafted."""
    from ppow_jax.inference import shown

    if not stream:
        result = model.generate(prompt, **decoding)[0]
        coloured = origin and shown.colours(sys.stdout)
        print(f"{shown.coloured(result)}\n({shown.legend(result)})" if coloured else result.text)
        return result
    pieces = model.stream(prompt, **decoding)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return pieces.result


def command_line() -> NoReturn:
    """`ppow-generate`, and `python -m experiments.generate`."""
    cli.run(main, Settings)


if __name__ == "__main__":
    command_line()
