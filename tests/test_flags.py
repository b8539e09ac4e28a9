import dataclasses
import pathlib
import tomllib

import pytest

from ppow_jax import flags
from ppow_jax.errors import UserError
from ppow_jax.flags import check_fields, field, parse, require

ROOT = pathlib.Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Settings:
    steps: int = field(10, "Steps.", low=1)
    rate: float = field(1e-4, "Rate.", low=0.0, high=1.0, group="Optimizer", may_change=True)
    resume: bool = field(True, "Resume.")
    mode: str = field("chain", "Mode.", choices=("chain", "tree"))
    drafter: str | None = field(None, "Drafter.")
    layers: tuple[int, ...] = field((2, 15, 27), "Layers.", low=0)
    names: tuple[str, ...] = field((), "Names.", choices=("gsm8k", "mt_bench"))
    scales: tuple[float, ...] = field((0.1,), "Scales.")
    limit: float | None = field(0.5, "Limit.")

    def __post_init__(self):
        check_fields(self)
        require(len(self.layers) == 3, f"--layers={','.join(map(str, self.layers))}: must be three layers")


def error(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(Settings, argv)
    return str(caught.value)


def test_every_type_is_parsed():
    argv = ["--steps=3", "--rate", "0.25", "--noresume", "--mode=tree", "--drafter=a=b", "--layers=1, 2,3"]
    settings = parse(Settings, [*argv, "--names=gsm8k,mt_bench", "--scales=", "--limit=none"])
    assert settings == Settings(
        3, 0.25, False, "tree", "a=b", (1, 2, 3), ("gsm8k", "mt_bench"), scales=(), limit=None
    )
    assert parse(Settings, []) == Settings()
    assert parse(Settings, ["--drafter=x", "--drafter=none", "--resume=false"]) == Settings(resume=False)


def test_defaults_of_an_entry_point_replace_those_of_the_class():
    assert parse(Settings, [], {"steps": 7}) == Settings(steps=7)
    assert parse(Settings, ["--steps=8"], {"steps": 7}) == Settings(steps=8)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--steps=0", "--steps=0: must be at least 1"),
        ("--steps=many", "--steps=many: must be an integer"),
        ("--steps=none", "--steps=none: must be an integer"),
        ("--steps", "--steps: needs a value"),
        ("--rate=2", "--rate=2.0: must be at most 1.0"),
        ("--rate=nan", "--rate=nan: must be a number"),
        ("--resume=maybe", "--resume=maybe: must be true or false"),
        ("--noresume=1", "--noresume=1 does not take an argument"),
        ("--mode=tre", "--mode=tre: must be one of chain, tree (did you mean tree?)"),
        ("--layers=1,x,3", "--layers=1,x,3: must be a comma list, each an integer"),
        ("--layers=1,-2,3", "--layers=1,-2,3: must be at least 0"),
        ("--layers=1,2", "--layers=1,2: must be three layers"),
        ("--names=gsm8k,foo", "--names=gsm8k,foo: must be one of gsm8k, mt_bench"),
        ("--step=3", "--step: unknown flag; did you mean --steps?"),
        ("--draftre=3", "--draftre: unknown flag; did you mean --drafter?"),
        ("--flag_file=x", "--flag_file: unknown flag; did you mean --flagfile?"),
        ("--zzzzzz=3", "--zzzzzz: unknown flag (see --help)"),
        ("--drafter=caf\udce9", r"'--drafter=caf\udce9': must be UTF-8 text"),
        ("stray", "'stray': unexpected argument; settings are written --name=value"),
    ],
)
def test_a_mistake_is_one_message_with_flag_value_and_rule(argument, message):
    assert error(argument) == message


def test_an_error_in_a_flagfile_names_file_and_line(tmp_path):
    inner, outer = tmp_path / "inner.flags", tmp_path / "outer.flags"
    inner.write_text("// comment\n--steps=0\n")
    outer.write_text(f"# comment\n\n--rate=0.5\n--flagfile={inner}\n")
    assert error(f"--flagfile={outer}") == f"{inner}:2: --steps=0: must be at least 1"
    assert parse(Settings, ["--flagfile", str(outer), "--steps=4"]) == Settings(steps=4, rate=0.5)
    inner.write_text("--stpes=1\n")
    assert error(f"--flagfile={outer}") == f"{inner}:1: --stpes: unknown flag; did you mean --steps?"
    inner.write_text("steps=1\n")
    assert error(f"--flagfile={inner}") == f"{inner}:1: must be --name=value or a comment, found 'steps=1'"
    inner.write_text(f"--flagfile={outer}\n")
    assert error(f"--flagfile={outer}") == f"--flagfile={outer}: includes itself"
    inner.write_bytes(b"\xff\xfe\x00")
    assert error(f"--flagfile={inner}") == f"--flagfile={inner}: must be a text file"
    inner.write_bytes(b"\xef\xbb\xbf--steps=4\r\n")  # a byte order mark is no part of it
    assert parse(Settings, [f"--flagfile={inner}"]) == Settings(steps=4)
    assert error("--flagfile=/nowhere").startswith("--flagfile=/nowhere: cannot be read (No such file")


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings(1, 0.1 + 0.2, False, "tree", "--x=# 'y' ü", (0, 1, 2), ("gsm8k",), (1e400, 1e-45), None),
        Settings(drafter="", scales=()),
    ],
)
def test_a_written_flagfile_repeats_the_run_exactly(tmp_path, settings):
    path = tmp_path / "flags.txt"
    flags.write_flagfile(path, settings)
    assert flags.read_flagfile(Settings, path) == settings
    assert parse(Settings, [f"--flagfile={path}"]) == settings
    assert [p.name for p in tmp_path.iterdir()] == ["flags.txt"]


@pytest.mark.parametrize("text", ["two\nlines", " blank", "none"])
def test_a_text_that_a_flagfile_would_change_is_refused(tmp_path, text):
    with pytest.raises(UserError, match="--drafter=.*: cannot be kept in a flagfile"):
        flags.write_flagfile(tmp_path / "flags.txt", Settings(drafter=text))


def test_differences_name_both_values_of_what_may_not_change():
    old, new = Settings(), Settings(steps=20, rate=0.5, drafter="d")
    assert flags.differences(old, new) == ["--steps=10 (now 20)", "--drafter=none (now d)"]
    assert flags.differences(old, old) == []


def test_requirements_txt_repeats_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == project["dependencies"]
