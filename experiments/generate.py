"""Answers one prompt with a drafter or without, and says how fast that was.

    python -m experiments.generate --prompt="Why is the sky blue?" --compare

For --target=smollm2-135m a drafter comes along (drafters/smollm2-135m); --drafter=none decodes plainly.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from ppow_jax import cli
from ppow_jax.config import check_fields, field, require
from ppow_jax.errors import UserError

if TYPE_CHECKING:
    from ppow_jax.evaluation.decoding import Decoded
    from ppow_jax.weights.targets import Target


@dataclasses.dataclass(frozen=True)
class Settings:
    """The flags of this program."""

    prompt: str | None = field(None, "What to answer.", group="Prompt")
    prompt_file: str | None = field(None, "A text file with it, instead.", group="Prompt")
    raw: bool = field(False, "Continue the prompt as it stands, without chat template.", group="Prompt")

    target: str = field(
        "smollm2-135m", "smollm2-135m, tiny, a .gguf file, a directory or a hub name.", group="Models"
    )
    drafter: str | None = field(
        "auto",
        "The drafter's directory; none decodes plainly. auto: drafters/TARGET, if there is one.",
        group="Models",
    )
    dtype: str = field("bfloat16", "Of all matrices.", choices=("bfloat16", "float32"), group="Models")

    max_new_tokens: int = field(256, "Longest answer.", low=1, group="Decoding")
    window: int = field(7, "Drafted tokens per round, K.", low=1, high=64, group="Decoding")
    temperature: float = field(0.0, "0 is greedy.", low=0, high=100, group="Decoding")
    seed: int = field(0, "Of sampling.", low=0, high=2**31 - 1, group="Decoding")
    compare: bool = field(False, "Decode with and without the drafter, and compare.", group="Decoding")

    def __post_init__(self):
        check_fields(self)
        given = (self.prompt is not None) + (self.prompt_file is not None)
        require(given == 1, "--prompt=TEXT or --prompt_file=FILE: one of them must be given")
        require(
            not self.compare or self.drafter is not None,
            "--compare: needs a drafter to compare with, but --drafter=none",
        )


def main(settings: Settings) -> None:
    """Prints the answer, then its speed."""
    text = read_prompt(settings)

    from ppow_jax.evaluation import decoding, loading  # slow to import: after the settings' checks
    from ppow_jax.speculation.settings import chain
    from ppow_jax.weights import targets

    directory = loading.find_drafter(settings.drafter, settings.target)
    require(
        not settings.compare or directory is not None,
        f"--compare: needs a drafter, but --target={settings.target} has none; name one: --drafter=DIR",
    )
    target = targets.load(settings.target, settings.dtype)
    drafter = loading.load_drafter(directory, target, settings.dtype) if directory else None
    tokens = encode(target, text, settings.raw)
    how = decoding.Decoding(
        chain(settings.window), settings.temperature, settings.max_new_tokens, seed=settings.seed
    )
    source = "--prompt" if settings.prompt_file is None else f"--prompt_file={settings.prompt_file}"
    decoding.require_room(target, len(tokens), how, source)

    arms = (None, drafter) if settings.compare else (drafter,)
    for arm in arms:  # compiles
        decoding.decode(target, arm, [tokens], how, rounds=1)
    runs = [decoding.decode(target, arm, [tokens], how) for arm in arms]
    answer = runs[-1]
    print(target.tokenizer.decode(answer.answers[0].tolist(), skip_special_tokens=True))
    print(f"\n{summary(answer, 'with the drafter' if drafter else 'without a drafter')}")
    if settings.compare:
        print(comparison(runs[0], answer, settings.temperature))


def read_prompt(settings: Settings) -> str:
    """The prompt's text; raises UserError when there is none."""
    if settings.prompt_file is None:
        require(bool(settings.prompt.strip()), "--prompt: must not be empty")
        return settings.prompt
    try:
        text = Path(settings.prompt_file).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--prompt_file={settings.prompt_file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"--prompt_file={settings.prompt_file}: must be a text file in UTF-8") from None
    require(bool(text.strip()), f"--prompt_file={settings.prompt_file}: is empty")
    return text


def encode(target: "Target", text: str, raw: bool):
    """Token ids int32 [T] of a user's message and the generation prompt, or with `raw` of the text itself."""
    import numpy as np

    from ppow_jax.data.conversations import Message
    from ppow_jax.data.encoding import encode_prompt

    if raw:
        return np.asarray(target.tokenizer(text)["input_ids"], np.int32)
    return encode_prompt(target.tokenizer, [Message("user", text)])


def summary(run: "Decoded", name: str) -> str:
    """One line: tokens, speed, and tau where there was a drafter."""
    speed = run.decode_tokens / run.decode_seconds if run.decode_tokens else 0.0
    line = f"{len(run.answers[0])} tokens {name}, {speed:.1f} token/s (prefill {run.prefill_seconds:.2f} s)"
    if run.accepted_BxK1.shape[1] == 1 or not run.verifications:
        return line
    return f"{line}, tau {run.decode_tokens / run.verifications:.2f}"


def comparison(plain: "Decoded", fast: "Decoded", temperature: float) -> str:
    """Plain decoding's line, and what the drafter gained."""
    lines = [summary(plain, "without a drafter")]
    if plain.decode_tokens and fast.decode_tokens:
        seconds = [run.decode_seconds / run.decode_tokens for run in (plain, fast)]
        lines.append(f"speedup {seconds[0] / seconds[1]:.2f}")
    if temperature == 0:
        same = plain.answers[0].tolist() == fast.answers[0].tolist()
        differ = "the outputs differ, by rounding: --dtype=float32 makes them identical"
        lines.append("the outputs are identical" if same else differ)
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main, Settings)
