"""settings.py: constants that are flags, and what a resumed run inherits."""

import sys
import types

import pytest

from settings import SettingError, Settings

SCRIPT = """
depth: int | None = None  # layers; 100% of the model
minutes: float | None = None  # wall time
steps: int | None = None  # updates
seed: int = 42  # of everything
share: float = 0.5  # of the run
compile: bool | None = None  # with a compiler
every: int | None = None  # steps between evaluations
batch: int | None = None  # rows that this machine can hold
name: str = "a"  # a text
data: str | None = None
"""
HORIZONS = ("minutes", "steps")
LIMITS = {"seed": (0, 100), "every": (-1, 1e9)}


@pytest.fixture
def read(tmp_path, monkeypatch):
    """read("--depth 3", seed=7) -> the Settings of the script, with that flag and that edited constant."""

    def start(flags="", **edits):
        source = SCRIPT
        for name, value in edits.items():
            line = next(line for line in SCRIPT.splitlines() if line.startswith(f"{name}:"))
            source = source.replace(line, f"{line.split(' = ')[0]} = {value!r}  #{line.partition('#')[2]}")
        script = tmp_path / "script.py"
        script.write_text(source)
        module = types.ModuleType("script_under_test")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(compile(source, str(script), "exec", dont_inherit=True), vars(module))
        convert = {"data": lambda path: f"/home/{path.removeprefix('/home/')}"}
        return Settings(vars(module), script, exclusive=HORIZONS, convert=convert, arguments=flags.split())

    return start


def resume(settings, saved, requested_before, **options):
    """Resume a run with these saved settings -> the lines about differences."""
    defaults = settings.constants | saved
    rules = {"found_again": ["batch"], "with_exclusive": ["compile", "every"]}
    return settings.inherit(defaults, requested_before, **rules | options)


def test_a_flag_wins_over_a_constant_and_auto_is_none(read):
    settings = read("--depth 3 --share 0.25 --no-compile --every auto --name x", seed=7, every=5)
    assert settings.values(without=["data"]) == {
        **{"depth": 3, "minutes": None, "steps": None, "seed": 7, "share": 0.25, "compile": False},
        **{"every": None, "batch": None, "name": "x"},
    }
    assert settings.requested == {"depth": 3, "share": 0.25, "compile": False, "every": None, "name": "x"}


def test_an_edited_constant_counts_as_requested_like_a_flag(read):
    assert read(compile=True, depth=3).requested == read("--compile --depth 3").requested


def test_a_flag_replaces_an_edited_constant_that_excludes_it(read):
    settings = read("--steps 20", minutes=10.0)
    settings.check(LIMITS)
    assert settings.values()["minutes"] is None and settings.values()["steps"] == 20
    assert "minutes" not in settings.requested


@pytest.mark.parametrize("flags, edits", [("--steps 2 --minutes 1", {}), ("", {"steps": 2, "minutes": 1.0})])
def test_two_horizons_are_refused(read, flags, edits):
    with pytest.raises(SettingError, match="two horizons are set: --minutes and --steps.\nSet at most one."):
        read(flags, **edits).check(LIMITS)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--depth 0", "--depth 0 is out of range.\nGive a number above 0."),
        ("--depth -1", "--depth -1 is out of range.\nGive a number above 0."),
        ("--seed 101", "--seed 101 is out of range.\nGive a number from 0 to 100."),
        ("--every 0", "--every 0 is out of range.\nGive a number above 0, or -1 for never."),
        ("--minutes inf", "--minutes inf is out of range.\nGive a number above 0."),
        ("--minutes nan", "--minutes nan is out of range.\nGive a number above 0."),
    ],
)
def test_a_number_out_of_range_is_refused(read, flags, message):
    with pytest.raises(SettingError) as error:
        read(flags).check(LIMITS)
    assert str(error.value) == message and error.value.exit_status == 2


def test_numbers_in_range_are_accepted(read):
    read("--every -1 --seed 0 --share 0.01").check(LIMITS)


@pytest.mark.parametrize("flags", ["--detph 3", "--dept 3", "--depth three", "--depth 1.5", "--seed auto"])
def test_wrong_flags_name_the_help(read, flags):
    with pytest.raises(SettingError, match="\n`python script.py --help` lists all settings.") as error:
        read(flags)
    assert str(error.value).count("\n") == 1


@pytest.mark.parametrize("edits", [{"depth": "3"}, {"seed": 1.5}, {"compile": 1}, {"name": None}])
def test_a_constant_of_another_type_is_refused(read, edits):
    with pytest.raises(SettingError, match=f"^{next(iter(edits))} = "):
        read(**edits)


def test_an_integer_is_good_for_a_float(read):
    assert read(minutes=10).values()["minutes"] == 10


def test_help_shows_name_default_and_comment(read, capsys):
    with pytest.raises(SystemExit):
        read("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "--depth INT layers; 100% of the model [auto]" in text
    assert "--compile, --no-compile with a compiler [auto]" in text
    assert "--seed INT of everything [42]" in text


def test_a_resume_keeps_what_was_saved(read):
    settings = read("", depth=9, seed=1)
    saved = {"depth": 3, "steps": 20, "seed": 7, "compile": True, "every": 4, "batch": 8, "unknown": 1}
    lines = resume(settings, saved, {"depth": 3, "seed": 7})
    values = settings.values()
    assert [values[name] for name in ("depth", "steps", "seed", "compile", "every")] == [3, 20, 7, True, 4]
    assert values["batch"] is None  # it belongs to the machine
    assert lines == [] and "unknown" not in settings.namespace


def test_a_resume_keeps_what_was_requested_of_the_machine(read):
    settings = read()
    resume(settings, {"batch": 8}, {"batch": 9})
    assert settings.values()["batch"] == 9 and settings.requested == {"batch": 9}  # 8 was the nearest divisor


def test_a_resume_prints_each_difference(read):
    settings = read("--seed 3", depth=9)
    lines = resume(settings, {"depth": 3, "seed": 7}, {})
    assert lines == ["--seed was 7, is 3", "--depth stays 3, as saved"]
    assert settings.values()["seed"] == 3 and settings.values()["depth"] == 3


def test_a_repeated_command_line_changes_nothing(read):
    """Not even what follows from the horizon; values count as saved, as given, and with a relative path."""
    flags = "--steps 20 --data text --batch 9 --depth auto"
    first = read(flags)
    saved = {"steps": 20, "data": "/home/text", "batch": 8, "depth": 5, "compile": True, "every": 4}
    again = read(flags)
    assert resume(again, saved, first.requested) == []
    assert {name: again.values()[name] for name in saved} == saved | {"batch": 9}
    assert again.requested == first.requested
    renamed = read("--data text")  # what was saved is another name for what was given
    assert resume(renamed, {"data": "/home/text@commit"}, {"data": "/home/text"}) == []
    assert renamed.values()["data"] == "/home/text@commit"


def test_a_new_horizon_replaces_the_old_one_and_what_followed_from_it(read):
    settings = read("--minutes 5")
    saved = {"steps": 20, "compile": True, "every": 4}
    assert resume(settings, saved, {"steps": 20, "every": 4}) == ["--minutes was auto, is 5.0"]
    values = settings.values()
    assert (values["steps"], values["minutes"]) == (None, 5.0)
    assert values["compile"] is None and values["every"] == 4  # every was requested
    assert settings.requested == {"minutes": 5.0, "every": 4}
    both = read("--minutes 5 --steps 20")
    resume(both, saved, {"steps": 20})
    with pytest.raises(SettingError, match="two horizons"):
        both.check(LIMITS)


@pytest.mark.parametrize("requested_before", [{"every": 4}, {}])
def test_auto_on_a_resume_finds_a_value_again(read, requested_before):
    settings = read("--every auto")
    assert resume(settings, {"every": 4}, requested_before) == ["--every was 4, is auto"]
    assert settings.values()["every"] is None and settings.requested == {"every": None}
    repeated = read("--every auto")
    assert resume(repeated, {"every": 4}, {"every": None}) == [] and repeated.values()["every"] == 4


def test_what_a_resume_cannot_change_is_ignored_with_a_line(read):
    settings = read("--data other")
    lines = resume(settings, {"data": None}, {}, fixed=["data"])
    assert lines == ["--data /home/other is ignored: a resume does not change it"]
    assert settings.values()["data"] is None and "data" not in settings.requested
