"""The code is a star: scripts import rooms, and no room imports another one. The tests parse the code."""

import ast

import pytest
from conftest import REPO

ROOMS = "settings plan machine model optim_muon dataset dataloader checkpoint report".split()
SCRIPTS = ["train", "sample"]
OURS = {*ROOMS, *SCRIPTS, "export", "runs", "tests"}


def parse(path):
    """The syntax tree of a script, such as "export/export.py"."""
    return ast.parse((REPO / path).read_text(encoding="utf-8"))


def imports(tree):
    """The names of all modules that code imports, also inside functions; ".model" for a relative import."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {module} if node.module else {module + alias.name for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            if ast.unparse(node.func).split(".")[-1] in ("__import__", "import_module", "run_module"):
                names.add(node.args[0].value)
    return names


def our_imports(path):
    """The names of our modules that a script imports."""
    return {name for name in imports(parse(path)) if name.startswith(".") or name.split(".")[0] in OURS}


def uses_of(tree, name):
    """All places where code reads a name."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == name]


def test_the_reader_finds_every_kind_of_import():
    code = """
import a, b.c as d
from e.f import g
from . import h
from .i import j
def function():
    import k
    importlib.import_module("l")
    __import__("m")
"""
    assert imports(ast.parse(code)) == {"a", "b.c", "e.f", ".h", ".i", "k", "l", "m"}


def test_each_script_is_a_room_or_listed_above():
    assert sorted(path.stem for path in REPO.glob("*.py")) == sorted(ROOMS + SCRIPTS)
    assert not list((REPO / "runs").glob("*.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_imports_another_room(room):
    assert our_imports(f"{room}.py") == set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_import_only_rooms_and_the_export(script):
    assert our_imports(f"{script}.py") <= {*ROOMS, "export", "export.export"}


def test_an_export_works_without_this_repository():
    paths = [f"export/{path.name}" for path in (REPO / "export").glob("*.py")]
    found = {path: our_imports(path) for path in paths}
    assert found.pop("export/modeling_onedial.py") == {".model"}  # the copy of model.py beside it
    assert "export/export.py" in found and not any(found.values())


def test_only_settings_is_given_globals():
    train = parse("train.py")
    assert len(uses_of(train, "globals")) == 1
    calls, from_settings = [], {"settings"}
    for node in ast.walk(train):
        if isinstance(node, ast.Call) and "globals()" in map(ast.unparse, node.args):
            calls.append(ast.unparse(node.func).split(".")[0])
        elif isinstance(node, ast.ImportFrom) and node.module == "settings":
            from_settings |= {alias.asname or alias.name for alias in node.names}
    assert len(calls) == 1 and calls[0] in from_settings
    others = [f"{name}.py" for name in ROOMS + SCRIPTS if name not in ("settings", "train")]
    others += [f"export/{path.name}" for path in (REPO / "export").glob("*.py")]
    assert [path for path in others if uses_of(parse(path), "globals")] == []


def test_the_plan_works_without_torch():
    assert "torch" not in {name.split(".")[0] for name in imports(parse("plan.py"))}


@pytest.mark.parametrize("room", ["model", "dataloader"])
def test_a_room_without_a_command_line(room):
    assert uses_of(parse(f"{room}.py"), "__name__") == []
