"""What every entry point shares: flags to settings, --help, log lines, and errors without tracebacks.

Importing this starts no JAX, so that bad input is refused at once.
"""

import inspect
import itertools
import logging
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from ppow_jax import config as config_lib
from ppow_jax import progress
from ppow_jax.errors import UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

T = TypeVar("T")


def run(
    main: Callable[[T], int | None],
    config_cls: type[T],
    defaults: Mapping[str, Any] | None = None,
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Parses the command line into `config_cls`, calls `main(settings)`, and exits with what it returns.

    Args:
      main: the entry point; its module's docstring heads --help. None counts as success.
      config_cls: dataclass of `ppow_jax.config.field`s.
      defaults: values that replace the fields' own defaults here.
      argv: arguments without the program's name; by default those of the process.

    A UserError, from `main` as well, is printed as `error: ...` (exit code 2); Ctrl-C exits with 130; any
    other exception keeps its traceback.
    """
    argv = sys.argv[1:] if argv is None else argv
    if {"--help", "-help", "-h", "--helpfull"} & set(argv):
        print(usage(main, config_cls, defaults))
        sys.exit(0)
    setup_logging()
    try:
        sys.exit(main(config_lib.parse(config_cls, argv, defaults)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def setup_logging() -> None:
    """Log lines go to standard error as `12:30:59 text`; libraries speak up from warnings on."""
    handler = progress.LogHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("ppow_jax", "experiments", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports its every step there.


def usage(main: Callable, config_cls: type, defaults: Mapping[str, Any] | None = None) -> str:
    """The text of --help: the entry point's docstring and its flags by group, with defaults."""
    module = sys.modules[main.__module__]
    program = module.__spec__.name if module.__spec__ else main.__module__
    width = min(shutil.get_terminal_size((100, 24)).columns, 110)
    lines = [inspect.cleandoc(module.__doc__ or ""), ""]
    lines += [f"usage: python -m {program} [--name=value ...] [--flagfile=FILE ...]"]
    for group, members in itertools.groupby(config_lib.specs(config_cls), lambda spec: spec.group):
        lines += ["", f"{group}:"]
        for spec in members:
            default = (defaults or {}).get(spec.name, spec.default)
            shown = "" if default in (None, "", ()) else f" (default: {spec.format(default)})"
            lines += textwrap.wrap(
                f"{_form(spec):<30} {spec.help}{shown}",
                width,
                initial_indent="  ",
                subsequent_indent=" " * 33,
                break_on_hyphens=False,
                break_long_words=False,
            )
    return "\n".join(lines).strip()


def _form(spec: config_lib.Spec) -> str:
    """How the flag is written, as `--steps=N`."""
    if spec.kind is bool and not spec.many:
        return f"--[no]{spec.name}"
    kind = {int: "N", float: "X", str: "TEXT", bool: "BOOL"}[spec.kind]
    if spec.choices is not None:
        kind = "|".join(map(str, spec.choices))
    return f"--{spec.name}={kind},..." if spec.many else f"--{spec.name}={kind}"
