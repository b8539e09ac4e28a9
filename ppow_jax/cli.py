"""Common parts of all entry points: flags to settings, --help, log lines, and errors without tracebacks.

Importing this does not import JAX, so that bad input is refused at once.
"""

import difflib
import inspect
import itertools
import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ppow_jax import files, flags, progress
from ppow_jax.errors import UserError
from ppow_jax.flags import require

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

T = TypeVar("T")


HELP = {"--help", "-help", "-h", "--helpfull"}


def run(
    main: Callable[[T], int | None],
    config_cls: type[T],
    defaults: Mapping[str, Any] | None = None,
    argv: Sequence[str] | None = None,
    command: str | None = None,
) -> NoReturn:
    """Parses the command line into `config_cls`, calls `main(settings)`, and exits with its return value.

    Args:
      main: the entry point; its module's docstring heads --help. None counts as success.
      config_cls: dataclass of `ppow_jax.flags.field`s.
      defaults: values that replace the fields' own defaults here.
      argv: arguments without the program's name; by default those of the process.
      command: the word that selected `main`, whose own docstring then heads --help; see `run_command`.

    A UserError, also from `main`, is printed as `error: ...` (exit code 2); Ctrl-C exits with 130; any
    other exception keeps its traceback.
    """
    argv = sys.argv[1:] if argv is None else argv
    if HELP & set(argv):
        print(usage(main, config_cls, defaults, command))
        sys.exit(0)
    setup_logging()
    try:
        sys.exit(main(flags.parse(config_cls, argv, defaults)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def run_command(commands: Mapping[str, tuple[Callable, type]], argv: Sequence[str] | None = None) -> NoReturn:
    """Like `run`, for a program whose first argument selects a command.

    Args:
      commands: word -> (entry point, its dataclass of settings). The entry points' docstrings are their help; the
        docstring of the module that defines them heads the program's own --help.
      argv: arguments without the program's name; by default those of the process.
    """
    argv = sys.argv[1:] if argv is None else argv
    word = argv[0] if argv else ""
    if word in commands:
        main, config_cls = commands[word]
        run(main, config_cls, argv=argv[1:], command=word)
    if HELP & set(argv):
        print(_command_list(commands))
        sys.exit(0)
    near = difflib.get_close_matches(word, commands, n=1)
    found = f"{word!r}: unknown command{f'; did you mean {near[0]}?' if near else ''}" if word else "no command"
    print(f"error: {found} (the first argument must be one of {', '.join(commands)}; see --help)", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)


def _command_list(commands: Mapping[str, tuple[Callable, type]]) -> str:
    module = sys.modules[next(iter(commands.values()))[0].__module__]
    program = module.__spec__.name if module.__spec__ else module.__name__
    lines = [inspect.cleandoc(module.__doc__ or ""), "", f"usage: {invocation(program)} COMMAND [--help] ...", ""]
    for word, (main, _) in commands.items():
        lines.append(f"  {word:<10} {inspect.cleandoc(main.__doc__ or '').splitlines()[0]}")
    return "\n".join(lines).strip()


def setup_logging() -> None:
    """Sends log lines to standard error as `12:30:59 text`; libraries log warnings and errors only."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # such as: PyTorch was not found
    handler = progress.LogHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("ppow_jax", "experiments", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs its every step there, and the errors it raises


def keep_compiled(directory: str | None) -> None:
    """Caches compiled programs below `directory`, for later runs; None leaves JAX's settings unchanged.

    directory: of this machine, or the address of an object store, such as gs://BUCKET/NAME, which JAX itself writes to.
    Raises UserError if it cannot be written to. Call it before anything is compiled. Programs are specific to one kind
    of processor and one version of JAX: others add their own.
    """
    if directory is None:
        return
    try:
        path = directory if files.is_remote(directory) else files.writable_directory(directory)
    except UserError as error:
        raise UserError(f"--compilation_cache={directory}: {error}") from None
    import jax

    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def check_output(flag: str, path: str | None) -> None:
    """Raises UserError, naming the flag (`--output`), unless a file can be written at `path`; creates its directory."""
    if path is None:
        return
    require(not files.is_remote(path), f"{flag}={path}: {files.LOCAL}")
    require(not Path(path).is_dir(), f"{flag}={path}: must be a file, but is a directory")
    try:
        files.writable_directory(Path(path).parent)
    except UserError as error:
        raise UserError(f"{flag}={path}: {error}") from None


def invocation(program: str) -> str:
    """The command that started this process: an installed one, as `ppow-train`, or `python -m experiments.train`."""
    command = Path(sys.argv[0]).name
    return command if command == f"ppow-{program.rpartition('.')[2]}" else f"python -m {program}"


def usage(
    main: Callable, config_cls: type, defaults: Mapping[str, Any] | None = None, command: str | None = None
) -> str:
    """The text of --help: the entry point's docstring and its flags by group, with defaults."""
    module = sys.modules[main.__module__]
    program = module.__spec__.name if module.__spec__ else main.__module__
    width = min(shutil.get_terminal_size((100, 24)).columns, 110)
    specs = flags.specs(config_cls)
    words = [invocation(program), *([command] if command else []), *(_alone(s) for s in specs if s.positional)]
    lines = [inspect.cleandoc((main.__doc__ if command else module.__doc__) or ""), ""]
    lines += [f"usage: {' '.join(words)} [--name=value ...] [--flagfile=FILE ...]"]
    for group, members in itertools.groupby(specs, lambda spec: spec.group):
        lines += ["", f"{group}:"]
        for spec in members:
            default = (defaults or {}).get(spec.name, spec.default)
            shown = "" if default in (None, "", ()) else f" (default: {spec.format(default)})"
            lines += textwrap.wrap(
                f"{_alone(spec) if spec.positional else _form(spec):<30} {spec.help}{shown}",
                width,
                initial_indent="  ",
                subsequent_indent=" " * 33,
                break_on_hyphens=False,
                break_long_words=False,
            )
    return "\n".join(lines).strip()


def _alone(spec: flags.Spec) -> str:
    """Placeholder of a value without a flag, such as `DIRECTORY`."""
    return spec.name.upper()


def _form(spec: flags.Spec) -> str:
    """Syntax of the flag, such as `--steps=N`."""
    if spec.kind is bool and not spec.many:
        return f"--[no]{spec.name}"
    kind = {int: "N", float: "X", str: "TEXT", bool: "BOOL"}[spec.kind]
    if spec.choices is not None:
        kind = "|".join(map(str, spec.choices))
    return f"--{spec.name}={kind},..." if spec.many else f"--{spec.name}={kind}"
