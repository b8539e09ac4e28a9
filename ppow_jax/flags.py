"""Settings: frozen dataclasses, from which absl flags are generated.

    @dataclasses.dataclass(frozen=True)
    class Settings:
        steps: int = field(1000, "Optimizer steps.", low=1, group="Training")
        dtype: str = field("float32", "Precision of the target.", choices=("float32", "bfloat16"))
        layers: tuple[int, ...] = field((2, 15, 27), "Target layers whose input the drafter sees.")
        drafter: str | None = field(None, "Directory of a drafter to start from.")

        def __post_init__(self):
            check_fields(self)  # choices, low and high
            require(len(self.layers) == 3, f"--layers={self.layers}: must be three layers")

    settings = parse(Settings, ["--steps=20", "--flagfile=run/flags.txt"])
    write_flagfile("run/flags.txt", settings)  # --flagfile=run/flags.txt repeats it exactly

A field is an int, float, bool or str, one of these or None (written `none`), or a tuple of them (a comma
list). Every mistake raises one UserError that names flag, value and rule, and file and line in a flagfile.

absl parses the command line. Added here, because absl has no equivalent: flags from the fields of a dataclass, whose
types, choices and bounds are also checked in programs without a command line (absl validates global flags only); lists
of numbers with bounds for each element; optional values; the line of a flagfile in error messages, and suggestions for
misspelt values; values without `--name=`; flagfiles that repeat a run exactly, in groups; and the differences between
two runs.
"""

import dataclasses
import difflib
import itertools
import math
import os
import re
import shlex
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from absl import flags

from ppow_jax.errors import UserError
from ppow_jax.files import shipped, write_atomic

T = TypeVar("T")

_RULES = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def field(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] | None = None,
    low: float | None = None,
    high: float | None = None,
    group: str = "Settings",
    positional: bool = False,
    may_change: bool = False,
) -> Any:
    """A dataclass field that becomes a flag.

    Args:
      default: value if the flag is not given.
      help: one or two sentences for --help.
      choices: the allowed values (of each element, for a tuple).
      low: least allowed number (of each element, for a tuple).
      high: greatest allowed number.
      group: heading under which --help lists the flag.
      positional: allow the value to stand alone, without `--name=`.
      may_change: the value does not affect finished work, so that it may differ when a run is resumed.
    """
    metadata = {"help": help, "choices": choices, "low": low, "high": high, "group": group}
    metadata |= {"positional": positional, "may_change": may_change}
    return dataclasses.field(default=default, metadata=metadata)


def require(condition: bool, message: str) -> None:
    """Raises UserError(message) unless `condition`: `require(k > 0, f"--window={k}: must be positive")`."""
    if not condition:
        raise UserError(message)


@dataclasses.dataclass(frozen=True)
class Spec:
    """Description of a field's flag, from its annotation and metadata."""

    name: str
    kind: type  # int, float, bool or str
    optional: bool
    many: bool
    default: Any
    help: str
    group: str
    choices: Sequence[Any] | None
    low: float | None
    high: float | None
    positional: bool
    may_change: bool

    def parse(self, text: str) -> Any:
        """The value of a flag's text; raises UserError if it is malformed."""
        if self.optional and text == "none":
            return None
        if not self.many:
            return self._parse_one(text, text)
        return tuple(self._parse_one(part.strip(), text) for part in text.split(",")) if text else ()

    def _parse_one(self, part: str, text: str) -> Any:
        try:
            value = _BOOLEANS[part.lower()] if self.kind is bool else self.kind(part)
        except (KeyError, ValueError):
            listed = "a comma list, each " if self.many else ""
            raise UserError(f"--{self.name}={text}: must be {listed}{_RULES[self.kind]}") from None
        return value

    def format(self, value: Any) -> str:
        """Text of a value, the inverse of `parse`."""
        if value is None:
            return "none"
        if self.many:
            return ",".join(self._format_one(part) for part in value)
        return self._format_one(value)

    def _format_one(self, value: Any) -> str:
        if self.kind is bool:
            return str(bool(value)).lower()
        return repr(float(value)) if self.kind is float else str(value)

    def check(self, value: Any) -> None:
        """Raises UserError if `value` breaks the field's choices or bounds."""
        if value is None:
            require(self.optional, f"--{self.name}=none: must be {_RULES[self.kind]}")
            return
        for part in value if self.many else (value,):
            given = f"--{self.name}={self.format(value)}"
            if self.choices is not None and part not in self.choices:
                near = difflib.get_close_matches(str(part), map(str, self.choices), n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise UserError(f"{given}: must be one of {', '.join(map(str, self.choices))}{hint}")
            if self.kind is float:
                require(not math.isnan(part), f"{given}: must be a number")
            if self.low is not None:
                require(part >= self.low, f"{given}: must be at least {self.low}")
            if self.high is not None:
                require(part <= self.high, f"{given}: must be at most {self.high}")


def specs(cls: type) -> list[Spec]:
    """The flags of a dataclass, in the order of its fields."""
    hints = typing.get_type_hints(cls)
    return [_spec(f, hints[f.name]) for f in dataclasses.fields(cls)]


def _spec(f: dataclasses.Field, hint: Any) -> Spec:
    optional = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    if optional:
        hint = next(arg for arg in typing.get_args(hint) if arg is not types.NoneType)
    many = typing.get_origin(hint) is tuple
    kind = typing.get_args(hint)[0] if many else hint
    if kind not in _RULES:
        raise TypeError(f"{f.name}: a flag cannot hold {hint}")
    return Spec(f.name, kind, optional, many, f.default, **f.metadata)


def check_fields(config: Any) -> None:
    """Checks every field's choices and bounds; call it first in `__post_init__`.

    Raises:
      UserError: names flag, value and rule.
    """
    for spec in specs(type(config)):
        spec.check(getattr(config, spec.name))


class _Parser(flags.ArgumentParser):
    def __init__(self, spec: Spec):
        self.spec = spec

    def parse(self, argument: Any) -> Any:
        return self.spec.parse(argument) if isinstance(argument, str) else argument


def define_flags(cls: type, flag_values: flags.FlagValues = flags.FLAGS, **defaults: Any) -> None:
    """Defines one absl flag per field of `cls`; `defaults` replace the fields' own."""
    for spec in specs(cls):
        default = defaults.get(spec.name, spec.default)
        boolean = spec.kind is bool and not spec.many
        flag = flags.Flag(_Parser(spec), None, spec.name, None, spec.help, boolean=boolean)
        flag.value = default  # set afterwards: absl would parse a default text such as "none"
        flags.DEFINE_flag(flag, flag_values, module_name=cls.__module__)


def from_flags(cls: type[T], flag_values: flags.FlagValues = flags.FLAGS) -> T:
    """Settings from parsed flags; raises the errors of the dataclass's own checks."""
    return cls(**{spec.name: flag_values[spec.name].value for spec in specs(cls)})


def parse(cls: type[T], argv: Sequence[str], defaults: Mapping[str, Any] | None = None) -> T:
    """Parses command line arguments (without the program's name) into settings.

    Args:
      cls: the dataclass.
      argv: such as `["--steps=3", "--flagfile=FILE"]`; if a flag is given twice, the last one is used.
      defaults: values that replace the fields' own defaults.

    Raises:
      UserError: unknown flag, malformed or forbidden value, missing flagfile.
    """
    flag_values = flags.FlagValues()
    flag_values.set_gnu_getopt(any(spec.positional for spec in specs(cls)))  # allows flags after positional values
    define_flags(cls, flag_values, **(defaults or {}))
    places: dict[str, str] = {}
    arguments = []
    for argument, place in _expand_flagfiles(argv):
        require(_is_text(argument), f"{ascii(argument)}: must be UTF-8 text")
        arguments.append(argument)
        if argument.startswith("-"):
            name = argument.lstrip("-").partition("=")[0]
            places[name if name in flag_values else name.removeprefix("no")] = places[name] = place
    try:
        rest = flag_values(["", *arguments])[1:]
        for spec in specs(cls):
            if spec.positional and rest:
                flag_values[spec.name].value = spec.parse(rest.pop(0))
        require(not rest, f"{(rest or [''])[0]!r}: unexpected argument; settings are written --name=value")
        return from_flags(cls, flag_values)
    except flags.UnrecognizedFlagError as error:
        known = [*flag_values, "flagfile", "help"]
        near = difflib.get_close_matches(error.flagname.replace("-", "_"), known, n=1)
        hint = f"; did you mean --{near[0]}?" if near else " (see --help)"
        message = f"--{error.flagname}: unknown flag{hint}"
    except (flags.Error, ValueError) as error:  # a value is missing, or --noflag has one
        found = re.search(r"--?(\w+)", str(error))
        name = found[1] if found else ""
        message = f"--{name}: needs a value" if "Missing" in str(error) else str(error)
    except UserError as error:
        message = str(error)
    found = re.match(r"--(\w+)", message)
    place = places.get(found[1], "") if found else ""
    raise UserError(f"{place}: {message}" if place else message)


def _is_text(argument: str) -> bool:
    """False if bytes of the command line were not UTF-8: Python represents them as halves of surrogate pairs."""
    return argument.isascii() or not any("\ud800" <= sign <= "\udfff" for sign in argument)


def _expand_flagfiles(argv: Sequence[str], open_files: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Yields (argument, place), each --flagfile replaced by its lines; place is "" or "FILE:LINE"."""
    arguments = iter(argv)
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if name not in ("--flagfile", "-flagfile"):
            yield argument, ""
            continue
        path = os.path.expanduser(path if equals else next(arguments, ""))
        require(path not in open_files, f"--flagfile={path}: includes itself")
        try:
            lines = shipped(path).read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise UserError(f"--flagfile={path}: cannot be read ({error.strerror or error})") from None
        except UnicodeDecodeError:
            raise UserError(f"--flagfile={path}: must be a text file") from None
        for number, line in enumerate(map(str.strip, lines), start=1):
            if not line or line.startswith(("#", "//")):
                continue
            place = f"{path}:{number}"
            require(line.startswith("-"), f"{place}: must be --name=value or a comment, found {line[:60]!r}")
            for inner, inner_place in _expand_flagfiles([line], (*open_files, path)):
                yield inner, inner_place or place


def write_flagfile(path: str | os.PathLike, config: Any) -> None:
    """Writes every setting to a flagfile, so that --flagfile=PATH repeats the run exactly.

    Raises:
      UserError: a text that a flagfile cannot hold (a line break, outer blanks, a comma within a list).
    """
    lines = ["# The settings of this run: --flagfile=THIS_FILE repeats it."]
    for group, members in itertools.groupby(specs(type(config)), lambda spec: spec.group):
        lines += ["", f"# {group}"]
        for spec in members:
            value = getattr(config, spec.name)
            text = spec.format(value)
            exact = spec.parse(text) == value and text == text.strip() and len(text.splitlines()) <= 1
            require(exact, f"--{spec.name}={text!r}: cannot be kept in a flagfile")
            lines.append(f"--{spec.name}={text}")
    write_atomic(path, "\n".join(lines) + "\n")


def command(program: str, config: Any) -> str:
    """The command line that has these settings, ready for a shell: flags with their defaults are left out.

    program: the module, as in `python -m experiments.train`.
    """
    return " \\\n  ".join([f"python -m {program}", *map(shlex.quote, changed(config))])


def changed(config: Any) -> list[str]:
    """The settings that are not the defaults, as flags."""
    found = [spec for spec in specs(type(config)) if getattr(config, spec.name) != spec.default]
    return [f"--{spec.name}={spec.format(getattr(config, spec.name))}" for spec in found]


def read_flagfile(cls: type[T], path: str | os.PathLike) -> T:
    """Settings from a file by `write_flagfile`; raises the errors of `parse`."""
    return parse(cls, [f"--flagfile={os.fspath(path)}"])


def differences(old: Any, new: Any) -> list[str]:
    """Names settings in which two configurations of one class differ, as `--window=10 (now 7)`, except for those that
    may change.
    """
    return [
        f"--{spec.name}={spec.format(getattr(old, spec.name))} (now {spec.format(getattr(new, spec.name))})"
        for spec in specs(type(old))
        if not spec.may_change and getattr(old, spec.name) != getattr(new, spec.name)
    ]
