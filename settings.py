"""
Settings: annotated constants at the top of a script, each of which is also a flag.

    depth: int | None = None  # layers (auto: from the time)        -> --depth 12, --depth auto
    compile: bool = True  # use torch.compile                       -> --compile, --no-compile

A flag wins over a constant. A resumed run keeps the settings it has saved unless a flag changes them. This
file knows no setting by name.
"""

import argparse
import inspect
import math
import re
import sys
from pathlib import Path


class SettingError(Exception):
    """Invalid setting. The message has two lines: what is wrong, and how to fix it."""

    exit_status = 2


class Settings:
    """
    The settings of a script, read from its constants and its flags, and written back to its constants.

    namespace: the script's globals(); script: its path; exclusive: names of which at most one is not None;
    convert: {name: function} that brings a value into the form in which it is saved.
    types: {name: type}; cli_args: {name: value} of the flags; requested: {name: value} of what is not auto
    although it could be, and of all flags. SettingError for a flag that does not exist or has a wrong type.
    """

    def __init__(self, namespace, script, exclusive=(), convert=None, arguments=None):
        self.namespace, self.exclusive, self.convert = namespace, exclusive, convert or {}
        self.types = inspect.get_annotations(sys.modules[namespace["__name__"]])
        self.check_types()
        self.cli_args = self.converted(vars(self.parser(Path(script)).parse_args(arguments)))
        constants = self.converted({name: self.namespace[name] for name in self.types})
        if any(self.cli_args.get(name) is not None for name in exclusive):
            constants |= dict.fromkeys(exclusive)  # a flag replaces a constant that excludes it
        can_be_auto = {name for name, kind in self.types.items() if type(None) in parts(kind)}
        self.requested = without_none({name: constants[name] for name in can_be_auto}) | self.cli_args
        self.constants = constants
        self.namespace.update(constants | self.cli_args)

    def flag(self, name):
        """num_iterations -> --num-iterations"""
        return "--" + name.replace("_", "-")

    def values(self, without=()):
        """{name: value} as they are now, without some names."""
        return {name: self.namespace[name] for name in self.types if name not in without}

    def converted(self, values):
        """The values in the form in which they are saved."""
        functions = {name: f for name, f in self.convert.items() if values.get(name) is not None}
        return values | {name: function(values[name]) for name, function in functions.items()}

    def parser(self, script):
        """The argument parser; --help shows each name, default and the comment behind the constant."""
        comments = re.findall(r"^(\w+): .*?# *(.+)$", script.read_text(encoding="utf-8"), re.MULTILINE)
        comments = dict(comments)
        parser = argparse.ArgumentParser(usage=f"python {script.name} [--NAME VALUE ...]", allow_abbrev=False)

        def refuse(message):  # argparse's errors, as SettingError
            raise SettingError(f"{message}.\n`python {script.name} --help` lists all settings.")

        parser.error = refuse
        for name, kind in self.types.items():
            base, *none = parts(kind)
            default = "auto" if self.namespace[name] is None else self.namespace[name]
            help_text = f"{comments.get(name, '')} [{default}]".replace("%", "%%")
            options = {"help": help_text, "default": argparse.SUPPRESS}
            if base is bool:
                options["action"] = argparse.BooleanOptionalAction
            else:
                options |= {"type": or_auto(base) if none else base, "metavar": base.__name__.upper()}
            parser.add_argument(self.flag(name), **options)
        return parser

    def check_types(self):
        """SettingError for a constant that was edited to a value of another type."""
        for name, kind in self.types.items():
            value, expected = self.namespace[name], parts(kind)
            is_int_for_float = type(value) is int and float in expected
            if type(value) not in expected and not is_int_for_float:
                what = f"{name} = {value!r}: its type is {type(value).__name__}"
                raise SettingError(f"{what}.\nGive a value of type {getattr(kind, '__name__', kind)}.")

    def check(self, limits):
        """
        SettingError for a number out of range. limits: {name: (lowest, highest)}, where a lowest of -1 means
        -1 or above 0; numbers without limits must be above 0.
        """
        for name, value in self.values().items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            low, high = limits.get(name, (0, math.inf))
            is_zero_allowed = name in limits and low == 0
            in_range = low <= value <= high and value < math.inf and (value != 0 or is_zero_allowed)
            if not in_range or (low == -1 and -1 < value < 0):
                allowed = f"from {low:,} to {high:,}" if name in limits and low >= 0 else "above 0"
                allowed += ", or -1 for never" if low == -1 else ""
                raise SettingError(f"{self.flag(name)} {value} is out of range.\nGive a number {allowed}.")
        both = [self.flag(name) for name in self.exclusive if self.namespace[name] is not None]
        if len(both) > 1:
            raise SettingError(f"two horizons are set: {both[0]} and {both[1]}.\nSet at most one.")

    def require(self, values, source):
        """Set these settings, {name: value}. SettingError for one that is already set to another value."""
        for name, value in values.items():
            if self.namespace[name] not in (None, value):
                what = f"{self.flag(name)} {self.namespace[name]}: {source} needs {value}"
                raise SettingError(f"{what}.\nLeave out {self.flag(name)} or {source}.")
        self.namespace.update(values)

    def inherit(self, saved, requested_before, found_again=(), with_exclusive=(), fixed=()):
        """
        Take over the settings of the run to resume, {name: value}; a flag wins unless it repeats what the run
        was started with -> a line for each difference.

        requested_before: what an earlier start has requested; found_again: names whose auto value belongs to
        the machine and is not inherited; with_exclusive: names whose auto value depends on the exclusive
        settings, and is not inherited when those change; fixed: names that a resume cannot change.
        """
        saved = {name: value for name, value in saved.items() if name in self.types}
        requested_before = self.converted(requested_before)
        lines, changed = [], {}
        for name, value in self.cli_args.items():
            if name not in saved or value in (saved[name], requested_before.get(name, saved[name])):
                continue
            if name in fixed:
                lines.append(f"{self.flag(name)} {value} is ignored: a resume does not change it")
                continue
            lines.append(f"{self.flag(name)} was {shown(saved[name])}, is {shown(value)}")
            changed[name] = value
        if any(changed.get(name) is not None for name in self.exclusive):
            saved |= {name: self.cli_args.get(name) for name in self.exclusive}
            requested_before = {n: v for n, v in requested_before.items() if n not in self.exclusive}
            found_again = [*found_again, *with_exclusive]
        kept = {n: v for n, v in saved.items() if n not in found_again}
        kept |= {n: requested_before[n] for n in found_again if requested_before.get(n) is not None}
        for name, value in kept.items():
            was_requested = name in requested_before | self.cli_args
            if not was_requested and self.constants[name] not in (None, value):  # edited since then
                lines.append(f"{self.flag(name)} stays {value}, as saved")
        requested_now = {name: value for name, value in self.cli_args.items() if name not in fixed}
        self.requested = requested_before | requested_now
        self.namespace.update(kept | changed)
        return lines


def parts(kind):
    """int | None -> (int, NoneType); int -> (int,)"""
    return getattr(kind, "__args__", (kind,))


def without_none(values):
    return {name: value for name, value in values.items() if value is not None}


def shown(value):
    """A value as a flag has it."""
    return "auto" if value is None else value


def or_auto(base):
    """The function that reads a flag's value of this type, with `auto` as None."""

    def read(text):
        return None if text == "auto" else base(text)

    read.__name__ = base.__name__  # argparse's errors show it
    return read
