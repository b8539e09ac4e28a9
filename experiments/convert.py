"""Inspects, verifies and converts drafters, enlarges their vocabularies, and shares them on the hub.

    python -m experiments.convert inspect DIRECTORY
    python -m experiments.convert verify --target=meta-llama/Llama-3.1-8B-Instruct DIRECTORY
    python -m experiments.convert convert --format=speculators --output=OUT DIRECTORY
    python -m experiments.convert vocabulary --target=T --size=12288 --data=chats.jsonl --output=OUT DIRECTORY
    python -m experiments.convert card DIRECTORY
    python -m experiments.convert push --push_to_hub=OWNER/NAME DIRECTORY
    python -m experiments.convert fetch --output=OUT OWNER/NAME

The flat format is used by EAGLE, SpecForge, SGLang and sglang-jax, and vLLM reads it, too; the speculators format is
vLLM's own. Exit codes: 0 for success, 1 if a drafter does not help its target, 2 for wrong input.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ppow_jax import cli
from ppow_jax.flags import check_fields, field, require


def _directory(help: str) -> str:
    return field(None, help, positional=True)


def _check_directory(directory: str | None) -> Path:
    require(directory is not None, "DIRECTORY: must be named")
    path = Path(directory).expanduser()
    require(path.is_dir(), f"{directory}: {'is a file' if path.exists() else 'there is no such directory'}")
    return path


def _check_output(output: str | None, source: Path) -> None:
    require(output is not None, "--output: must be named, the directory for the new files")
    path = Path(output).expanduser()
    require(path.resolve() != source.resolve(), f"--output={output}: must be another directory")
    require(not (path / "config.json").exists(), f"--output={output}: holds a model already; name another directory")


@dataclasses.dataclass(frozen=True)
class InspectSettings:
    """The flags of `inspect`."""

    directory: str | None = _directory(
        "Directory of a drafter, a target or a training run; or a target as in --target: smollm2-135m, a .gguf file."
    )

    def __post_init__(self):
        check_fields(self)
        require(self.directory is not None, "DIRECTORY: must be named")


def inspect(settings: InspectSettings) -> None:
    """Checks all files of a drafter or a target, and prints a summary; of a training run, what it holds."""
    from ppow_jax.study import summary

    print(summary.text(settings.directory))


@dataclasses.dataclass(frozen=True)
class VerifySettings:
    """The flags of `verify`."""

    directory: str | None = _directory("Directory of the drafter.")
    target: str | None = field(None, "Target: smollm2-135m, tiny, a .gguf file, a directory or a hub name.")
    dtype: str = field("float32", "Dtype of all matrices.", choices=("float32", "bfloat16"))
    window: int = field(4, "Drafted tokens per round of the self-check.", low=1, high=64)
    max_new_tokens: int = field(48, "Tokens of each answer of the self-check.", low=8)

    def __post_init__(self):
        check_fields(self)
        require(self.target is not None, "--target: must be named: the model that the drafter is for")
        _check_directory(self.directory)


def verify(settings: VerifySettings) -> int:
    """Checks that a drafter fits a target, then decodes a few prompts to measure whether it helps.

    A drafter that is read with wrong layer ids, with a wrong vocabulary or for another target still loads, and the
    text is still exact, but few or none of its tokens are accepted. Such a drafter is refused, with the probable
    reason. Every other reading of its target layers is always tested, too.
    """
    from ppow_jax.evaluation import self_check
    from ppow_jax.weights import summary, targets
    from ppow_jax.weights.loading import load_drafter

    directory = _check_directory(settings.directory)
    target = targets.load(settings.target, settings.dtype)
    drafter = load_drafter(directory, target, settings.dtype, where=str(directory))
    found = self_check.self_check(target, drafter, settings.window, settings.max_new_tokens)
    print(summary.table(found.lines()))
    refusals = found.refusals(exact=settings.dtype == "float32")
    for refusal in refusals:
        print(f"\nrefused: {refusal}")
    return int(bool(refusals))


@dataclasses.dataclass(frozen=True)
class ConvertSettings:
    """The flags of `convert`."""

    directory: str | None = _directory("Directory of the drafter to read; its files are not changed.")
    format: str | None = field(None, "Format of the new files.", choices=("flat", "speculators"))
    output: str | None = field(None, "Directory for the new files; must not contain a model yet.")
    dtype: str | None = field(
        None, "Dtype of the new weights; none: unchanged.", choices=("bfloat16", "float16", "float32")
    )
    target: str | None = field(
        None,
        "The target; needed only to omit a copy of its embedding, or to write layer ids that the files do not contain.",
    )
    base_model: str | None = field(
        None, "The target's OWNER/MODEL on the hub, for the new files; by default that of the target, if known."
    )
    push_to_hub: str | None = field(None, "Also upload the new files, as this OWNER/NAME; see `push`.")

    def __post_init__(self):
        check_fields(self)
        require(self.format is not None, "--format: must be named, flat or speculators")
        _check_output(self.output, _check_directory(self.directory))
        from ppow_jax.weights import hub

        if self.base_model is not None:
            hub.check_name("--base_model=", self.base_model)
        if self.push_to_hub is not None:
            hub.check_upload(self.push_to_hub)


def convert(settings: ConvertSettings) -> None:
    """Writes a drafter in another format, with its model card; weights are unchanged unless --dtype is given."""
    from ppow_jax.weights import conversion

    source, output = _check_directory(settings.directory), Path(settings.output).expanduser()
    conversion.convert(source, output, settings.format, settings.dtype, settings.target, base_model=settings.base_model)
    print(f"{output}: the {settings.format} format of {source}")
    if settings.push_to_hub is not None:
        push(PushSettings(directory=settings.output, push_to_hub=settings.push_to_hub))


@dataclasses.dataclass(frozen=True)
class CardSettings:
    """The flags of `card`."""

    directory: str | None = _directory("Directory of a drafter.")

    def __post_init__(self):
        check_fields(self)
        _check_directory(self.directory)


def card(settings: CardSettings) -> None:
    """Tells how each serving engine reads a drafter's files, and warns where one silently misreads them.

    By the engines' own sources; `python -m experiments.serve_check` runs an engine. See docs/drafter_files.md.
    """
    from ppow_jax.engines import reading

    found = reading.readings(reading.of_directory(_check_directory(settings.directory)))
    print(reading.table(found))
    for line in reading.warnings(found):
        print(f"warning: {line}")


@dataclasses.dataclass(frozen=True)
class PushSettings:
    """The flags of `push`."""

    directory: str | None = _directory("Directory of a drafter; its model card is completed.")
    push_to_hub: str | None = field(None, "OWNER/NAME on the hub; the repository is created if it is missing.")
    private: bool = field(False, "Create it as a private repository.")
    base_model: str | None = field(None, "The target's OWNER/NAME, for the card; by default as in the card.")
    license: str | None = field(None, "Licence of the drafter, such as apache-2.0; by default as in the card.")
    figures: str | None = field(None, "Result file of experiments.evaluate, whose figures the card shows.")

    def __post_init__(self):
        check_fields(self)
        directory = _check_directory(self.directory)
        require((directory / "config.json").is_file(), f"{self.directory}: not a drafter, it has no config.json")
        require(self.push_to_hub is not None, "--push_to_hub: must be named, OWNER/NAME on the hub")
        from ppow_jax.weights import hub

        hub.check_upload(self.push_to_hub)
        if self.base_model is not None:
            hub.check_name("--base_model=", self.base_model)


def push(settings: PushSettings) -> None:
    """Uploads a drafter to the hub, with a model card: figures, licence, base model, tags.

    A card that exists keeps what it says, unless flags replace it; without one, or with --figures, it is written anew.
    """
    from ppow_jax.weights import card as cards
    from ppow_jax.weights import drafters, hub, summary

    directory = _check_directory(settings.directory)
    stored = drafters.import_drafter(directory, headless=True)
    if settings.figures is not None or not (directory / "README.md").exists():
        target = settings.base_model or stored.target_name or "the target"
        cards.write_card(
            directory,
            title=f"EAGLE-3 drafter for {target.rpartition('/')[2]}",
            target=target,
            figures=[] if settings.figures is None else cards.read_figures(settings.figures),
            command="not recorded",
            format=stored.format,
            license=settings.license or cards.LICENSE,
        )
    cards.complete(directory, format=stored.format, base_model=settings.base_model, license=settings.license)
    print(summary.table(summary.drafter_lines(directory)))
    print(f"{hub.push(directory, settings.push_to_hub, private=settings.private)}: uploaded from {directory}")


@dataclasses.dataclass(frozen=True)
class FetchSettings:
    """The flags of `fetch`."""

    name: str | None = field(None, "OWNER/NAME of a drafter on the hub.", positional=True)
    output: str | None = field(None, "Directory for its files; must not contain a model yet.")
    revision: str | None = field(None, "Branch, tag or commit; by default the newest.")

    def __post_init__(self):
        from ppow_jax.weights import hub

        check_fields(self)
        require(self.name is not None, "OWNER/NAME: must be named, a drafter on the hub")
        hub.check_name("", self.name)
        require(self.output is not None, "--output: must be named, the directory for the files")
        empty = not Path(self.output).expanduser().exists()
        require(empty, f"--output={self.output}: exists already; name another directory")


def fetch(settings: FetchSettings) -> None:
    """Downloads a drafter from the hub, checks its files, and tells what it is and how engines read it."""
    from ppow_jax.engines import reading
    from ppow_jax.weights import hub, summary

    output = hub.fetch(settings.name, Path(settings.output).expanduser(), settings.revision)
    print(summary.table(summary.drafter_lines(output)))
    for line in reading.warnings(reading.readings(reading.of_directory(output))):
        print(f"warning: {line}")


@dataclasses.dataclass(frozen=True)
class VocabularySettings:
    """The flags of `vocabulary`."""

    directory: str | None = _directory("Directory of the drafter to read; its files are not changed.")
    target: str | None = field(None, "Target: smollm2-135m, tiny, a .gguf file, a directory or a hub name.")
    size: int | None = field(None, "Tokens of the new draft vocabulary.", low=1)
    data: str = field("", "Texts whose tokens are counted: as --data of training.")
    answers_from: tuple[str, ...] = field((), "Answers whose tokens are counted: answers.npz of workdirs.")
    output: str | None = field(None, "Directory for the new files; must not contain a model yet.")

    def __post_init__(self):
        check_fields(self)
        require(self.target is not None, "--target: must be named: the model that the drafter is for")
        require(self.size is not None, "--size: must be named: the tokens of the new draft vocabulary")
        texts = bool(self.data or self.answers_from)
        require(texts, "--data or --answers_from: one must be named, the texts whose tokens are counted")
        _check_output(self.output, _check_directory(self.directory))


def vocabulary(settings: VocabularySettings) -> None:
    """Adds the most frequent missing tokens of your texts to a drafter's vocabulary; then train it on such texts.

    New rows of the drafter's head are copied from the target's. Train it then on texts that have these tokens:
    `experiments.train --drafter=OUT`. No model card is written: the figures of the old one would not describe the new
    drafter.
    """
    from ppow_jax.corpus import token_counts

    source, output = _check_directory(settings.directory), Path(settings.output).expanduser()
    found = token_counts.enlarge_vocabulary(
        source, output, settings.target, settings.size, settings.data, settings.answers_from
    )
    print(f"{output}: {settings.size} draft tokens in place of {found.old_size};")
    print(
        f"they hold {found.coverage:.1%} of the {found.counted:,} counted tokens, the old ones {found.old_coverage:.1%}"
    )


COMMANDS: dict[str, tuple[Callable, type]] = {
    "inspect": (inspect, InspectSettings),
    "verify": (verify, VerifySettings),
    "convert": (convert, ConvertSettings),
    "vocabulary": (vocabulary, VocabularySettings),
    "card": (card, CardSettings),
    "push": (push, PushSettings),
    "fetch": (fetch, FetchSettings),
}


def command_line() -> NoReturn:
    """`ppow-convert`, and `python -m experiments.convert`."""
    cli.run_command(COMMANDS)


if __name__ == "__main__":
    command_line()
