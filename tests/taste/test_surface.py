"""What is public: names, flags and errors, frozen here so that a change is meant."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from importlib import import_module

import pytest
import typer

import llmprune
from llmprune import cli
from llmprune.base import errors
from llmprune.recovery.distillation import DISTILLATIONS
from llmprune.recovery.methods import RECOVERIES
from llmprune.recovery.regrowth import REGROWTHS
from llmprune.recovery.schedules import SCHEDULES
from llmprune.recovery.soft import SOFT_MASKS

PUBLIC = [
    "METHODS",
    "Comparison",
    "LlmpruneError",
    "Recipe",
    "Report",
    "analyze",
    "bench",
    "compare",
    "evaluate",
    "gate",
    "inspect",
    "load",
    "perplexity",
    "plan",
    "prune",
    "push",
    "recover",
    "rolling_perplexity",
    "run",
]
FLAGS = [
    "--calib",
    "--device",
    "--dry-run",
    "--dtype",
    "--effort",
    "--help",
    "--json",
    "--max-memory",
    "--method",
    "--model",
    "--no-eval",
    "--num-samples",
    "--out",
    "--overwrite",
    "--pattern",
    "--profile",
    "--quiet",
    "--recipe",
    "--revision",
    "--seed",
    "--seq-len",
    "--set",
    "--sparsity",
    "--target",
    "--trust-remote-code",
    "--version",
]
COMMANDS = [
    *(
        "analyze",
        "bench",
        "compare",
        "delta",
        "eval",
        "export",
        "gate",
        "inspect",
        "methods",
        "plan",
        "push",
        "recover",
    ),
    "show",
    "stats",
]
EVAL_FLAGS = [
    "--apply-chat-template",
    "--baseline",
    "--batch-size",
    "--bos",
    "--device",
    "--dtype",
    "--help",
    "--include-path",
    "--json",
    "--limit",
    "--no-cache",
    "--num-fewshot",
    "--num-windows",
    "--perplexity",
    "--revision",
    "--rolling",
    "--seed",
    "--seq-len",
    "--stride",
    "--tasks",
    "--trust-remote-code",
]
HEAVY = ("torch", "transformers", "datasets", "peft", "lm_eval", "matplotlib", "accelerate")


def flags_of(command: typer.core.TyperCommand) -> list[str]:
    """Return the long options of a command, negative forms and help included."""
    context = typer.Context(command)
    found = {
        flag
        for param in command.get_params(context)
        if param.param_type_name == "option"
        for flag in (*param.opts, *param.secondary_opts)
        if flag.startswith("--")
    }
    return sorted(found)


def test_public_names_are_the_listed_ones_in_order() -> None:
    assert llmprune.__all__ == PUBLIC
    constants = [name for name in PUBLIC if name.isupper()]
    classes = [name for name in PUBLIC if name[0].isupper() and not name.isupper()]
    functions = [name for name in PUBLIC if name.islower()]
    assert sorted(constants) + sorted(classes) + sorted(functions) == PUBLIC


def test_every_public_name_can_be_imported_and_is_documented() -> None:
    for name in llmprune.__all__:
        value = getattr(llmprune, name)
        assert name in dir(llmprune)
        assert name == "METHODS" or inspect.getdoc(value), name


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="prun"):
        _ = llmprune.prun


def test_public_functions_are_those_of_the_api() -> None:
    api = import_module("llmprune.api")
    for name in filter(str.islower, PUBLIC):
        assert getattr(llmprune, name) is getattr(api, name)


def test_the_flags_of_the_bare_command_are_frozen() -> None:
    assert flags_of(typer.main.get_command(cli.app)) == FLAGS


def test_the_commands_are_frozen_and_documented() -> None:
    group = typer.main.get_command(cli.app)
    assert sorted(group.commands) == COMMANDS
    for name, command in group.commands.items():
        assert command.help, name


def test_the_table_of_methods_has_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["methods"])
    assert not ended.value.code
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert set(llmprune.METHODS) <= set(listed)


def test_the_tables_of_recovery_have_all_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["methods", "--recovery"])
    assert not ended.value.code
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()]
    tables = (RECOVERIES, SCHEDULES, REGROWTHS, SOFT_MASKS, DISTILLATIONS)
    heads = {table.kind for table in tables}
    assert set(listed) == heads.union(*tables)
    assert len(listed) == sum(map(len, tables)) + len(tables)


def test_the_flags_of_eval_are_frozen() -> None:
    group = typer.main.get_command(cli.app)
    assert flags_of(group.commands["eval"]) == EVAL_FLAGS


def test_plan_takes_the_flags_that_make_a_recipe() -> None:
    group = typer.main.get_command(cli.app)
    run_only = {"--dry-run", "--overwrite", "--profile", "--quiet", "--version"}
    assert set(flags_of(group.commands["plan"])) == set(FLAGS) - run_only


@pytest.mark.parametrize(
    "code",
    [
        "import llmprune",
        "import llmprune; dir(llmprune)",
        "from llmprune import cli; cli.main(['--help'])",
        "from llmprune import cli; cli.main(['-h'])",
        "from llmprune import cli; cli.main(['--version'])",
        "from llmprune import cli; cli.main(['--sparsity', '0.5'])",
    ],
)
def test_the_door_is_cheap(code: str) -> None:
    watched = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print('\\nLOADED', *sorted(set(sys.modules) & set({HEAVY!r}))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", watched + code], capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == (2 if "sparsity" in code else 0)
    assert done.stdout.splitlines()[-1].split() == ["LOADED"], done.stdout


def test_errors_are_the_tree_that_their_file_draws() -> None:
    """The drawing gives, per line, a class, its second base, and its depth under the first."""
    drawn = {}
    above: dict[int, str] = {}
    for line in str(errors.__doc__).splitlines():
        found = re.match(r"( *)(\w+)(?:\((\w+)\))?(?: |$)", line)
        if found is None or not hasattr(errors, found[2]):
            continue
        depth = len(found[1])
        above[depth] = found[2]
        drawn[found[2]] = (above.get(depth - 2), found[3])
    real = {
        name: kind
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, Exception)
    }
    assert drawn.keys() == real.keys()
    for name, (parent, builtin) in drawn.items():
        bases = [base.__name__ for base in real[name].__bases__]
        assert bases == [base for base in (parent or "Exception", builtin) if base], name


def test_every_error_of_ours_is_documented() -> None:
    for kind in vars(errors).values():
        if inspect.isclass(kind):
            assert inspect.getdoc(kind), kind
