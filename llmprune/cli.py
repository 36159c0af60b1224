"""The command line: the bare command prunes.

Exit codes: 0 done, 1 our fault, 2 yours, 130 stopped (and resumable).
"""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from llmprune import __version__
from llmprune.base.errors import LlmpruneError, RecipeError
from llmprune.base.progress import Progress
from llmprune.base.world import is_first
from llmprune.commands import looking, making, scoring, studying

if TYPE_CHECKING:
    from llmprune.base.progress import Mode
    from llmprune.recipe import Recipe

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
WHAT, HOW, RUN = "What to do", "Calibration", "The run"


def wishes(
    model: Annotated[
        str | None, Option(help="Folder, Hub id, or demo.", rich_help_panel=WHAT)
    ] = None,
    revision: Annotated[str | None, Option(help="Branch, tag or commit on the Hub.")] = None,
    sparsity: Annotated[
        float | None, Option(help="Share of the weights to remove, 0 to 1; N:M patterns fix it.")
    ] = None,
    method: Annotated[
        str | None,
        Option(help="See `llmprune methods`. [default: wanda, or what the pattern needs]"),
    ] = None,
    pattern: Annotated[
        str | None,
        Option(
            help="unstructured, N:M (keeps N of every M), HxW (tiles), or whole units, joined by "
            "a plus: ffn-channels+heads, blocks, sublayers, experts, hidden, vocabulary. "
            "[default: what the method is for]"
        ),
    ] = None,
    effort: Annotated[
        str | None,
        Option(
            help="fast, good or best: what is not given otherwise follows from it; see "
            "docs/METHODS.md. [default: what the method says]"
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        Option(
            help="ppl=+5% finds the highest sparsity that keeps perplexity in it. Of whole units, "
            "what is left: params=3B, size=4GB, kv=0.5x (cache), latency=0.7x (measured here), or "
            "0.8x of each. --sparsity is then the most."
        ),
    ] = None,
    out: Annotated[
        str | None, Option(help="Folder to write. [default: MODEL-METHOD-AMOUNT]")
    ] = None,
    calib: Annotated[
        str | None,
        Option(
            help="Calibration text: c4, wikitext2, fineweb-edu, open-platypus, ultrachat, demo, a "
            "file or folder, OWNER/NAME on the Hub, a mix: c4:3,ultrachat:1, or on-policy: the "
            "model writes it. "
            "[default: c4; with the demo model demo]"
        ),
    ] = None,
    num_samples: Annotated[int | None, Option(help="Calibration sequences. [default: 128]")] = None,
    seq_len: Annotated[
        int | None, Option(help="Tokens in each. [default: 2048, at most what the model takes]")
    ] = None,
    seed: Annotated[int | None, Option(help="Draws the calibration windows. [default: 0]")] = None,
    device: Annotated[
        str | None, Option(help="cuda, cuda:1, mps, cpu. [default: the first there is]")
    ] = None,
    dtype: Annotated[
        str | None,
        Option(help="auto, float32, bfloat16, float16: what is computed in. [default: auto]"),
    ] = None,
    max_memory: Annotated[str | None, Option(help="Limits such as cpu=8GB,cuda:0=6GB.")] = None,
    recipe: Annotated[Path | None, Option(help="A YAML recipe; flags go before it.")] = None,
    set_: Annotated[
        list[str] | None, Option("--set", help="Any key of the recipe: KEY=VALUE (repeatable).")
    ] = None,
    no_eval: Annotated[bool, Option("--no-eval", help="Measure no perplexity.")] = False,
    trust_remote_code: Annotated[
        bool, Option("--trust-remote-code", help="Run Python code that the model brings.")
    ] = False,
) -> dict[str, Any]:
    """Collect the flags that make a recipe."""
    return dict(locals())


def run_flags(
    dry_run: Annotated[bool, Option("--dry-run", help="Print the plan and stop.")] = False,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Replace an existing result or unfinished run.")
    ] = False,
    quiet: Annotated[bool, Option("--quiet", help="Print warnings and errors only.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print events as JSON lines.")] = False,
    profile: Annotated[
        bool,
        Option("--profile", help="Write what waits for what to OUT/llmprune/profile.json."),
    ] = False,
) -> dict[str, Any]:
    """Collect the flags of the run itself."""
    return dict(locals())


def takes(*parts: Callable[..., dict[str, Any]]) -> Callable[[Callable[..., None]], Any]:
    """Give a command the flags of several functions; it receives their answers in order."""
    merged = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for part in parts
        for parameter in inspect.signature(part, eval_str=True).parameters.values()
    ]

    def decorate(command: Callable[..., None]) -> Any:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[: -len(parts)]

        def wrapper(*args: Any, **given: Any) -> None:
            answers = []
            for part in parts:
                names = inspect.signature(part).parameters
                answers.append(part(**{name: given.pop(name) for name in names}))
            command(
                *args, **given, **dict(zip(_names(command)[-len(parts) :], answers, strict=True))
            )

        wrapper.__signature__ = inspect.Signature([*own, *merged])  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in [*own, *merged]}
        wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
        return wrapper

    return decorate


def _names(command: Callable[..., None]) -> list[str]:
    return list(inspect.signature(command).parameters)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"llmprune {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
@takes(wishes, run_flags)
def prune(
    ctx: typer.Context,
    version: Annotated[
        bool, Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    *,
    wish: dict[str, Any],
    flags: dict[str, Any],
) -> None:
    """Prune a Hugging Face language model into a folder that provably loads.

    llmprune --model demo --sparsity 0.5

    The same command again resumes an interrupted run.
    """
    if ctx.invoked_subcommand is not None:
        return
    recipe = make(wish)
    mode: Mode = "json" if flags["as_json"] else "quiet" if flags["quiet"] else "rich"
    progress = Progress(mode if is_first() else "quiet", profile=flags["profile"])
    if flags["dry_run"]:
        if is_first():
            show_plans(recipe, flags["as_json"])
        return
    if len(recipe.stages()) > 1 or recipe.recover is not None or recipe.push is not None:
        from llmprune.runs import run_recipe

        report = run_recipe(recipe, progress, overwrite=flags["overwrite"])
    else:
        from llmprune.engine.opening import open_plan
        from llmprune.steps import run_together

        opened = open_plan(recipe)
        progress.note(head_line(opened.plan))
        report = run_together(opened, progress, overwrite=flags["overwrite"])
    if report is None:  # another process than the first
        return
    progress.event("report", **report.data)
    if mode == "rich":
        print(report)
        print(f"details: llmprune show {report.out}, or {report.out}/llmprune/report.html")


@app.command("plan")
@takes(wishes)
def plan_command(
    as_json: Annotated[bool, Option("--json", help="Print the plan as JSON.")] = False,
    *,
    wish: dict[str, Any],
) -> None:
    """Print what a run would do and cost; no weight is read."""
    show_plans(make(wish), as_json)


def head_line(plan: Any) -> str:
    """Return what a run is about to do, with what is asked for and reached, in a line."""
    from llmprune.engine.reckoning import target_reached, target_text

    reached = target_reached(plan)
    wish = f"{target_text(reached)}, " if reached else ""
    if plan.searches:
        wish = f"ppl {plan.prune.target['ppl']}, at most "
    return (
        f"{plan.method.title} on {plan.source_name}: {plan.prune.pattern}, {wish}sparsity "
        f"{plan.sparsity:.4g}, {plan.dtype_name} on {plan.device}, writing {plan.out}"
    )


def show_plans(recipe: Recipe, as_json: bool) -> None:
    """Print the plan of a recipe as text or as JSON, and what its later stages are."""
    from llmprune.runs import later_lines, plans_of

    first, *later = plans_of(recipe)
    if as_json:
        from llmprune.engine.plan import Plan
        from llmprune.engine.plan_table import plan_data

        data = plan_data(first) if isinstance(first, Plan) else first.data()
        print(json.dumps(data | ({"then": later} if later else {}), indent=2))
        return
    print("\n".join([str(first), *later_lines(later)]))


COMMANDS: dict[str, Callable[..., None]] = {
    "inspect": looking.inspect,
    "methods": looking.methods,
    "gate": looking.gate,
    "eval": scoring.evaluate,
    "recover": making.recover,
    "delta": making.delta,
    "export": making.export,
    "bench": scoring.bench,
    "analyze": studying.analyze,
    "compare": studying.compare,
    "show": looking.show,
    "push": making.push,
}
for name, command in COMMANDS.items():
    app.command(name)(command)
STATS: dict[str, Callable[..., None]] = {
    "collect": studying.collect_stats,
    "merge": studying.merge_stats,
}
stats = typer.Typer(
    help="Collect statistics of a model as a folder, and add several of them.",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, command in STATS.items():
    stats.command(name)(command)
app.add_typer(stats, name="stats")


def make(wish: dict[str, Any]) -> Recipe:
    """Build the recipe of the flags; flags go before the recipe file, --set before both.

    Raises:
        RecipeError: neither model nor recipe, or whatever is wrong in them.
    """
    from llmprune.recipe import build, default_steps, override, read_recipe

    path = wish["recipe"]
    if path is None and wish["model"] is None:
        raise RecipeError(
            "model: missing. Type llmprune --model demo --sparsity 0.5 to try the bundled model, "
            "or give a folder, a Hub id or --recipe FILE. `llmprune --help` lists everything."
        )
    data: dict[str, Any] = read_recipe(path) if path else {"steps": default_steps()}
    top = ("model", "revision", "out", "device", "dtype", "seed")
    data |= {key: wish[key] for key in top if wish[key] is not None}
    if wish["trust_remote_code"]:
        data["trust_remote_code"] = True
    if wish["max_memory"]:
        data["max_memory"] = limits(wish["max_memory"])
    keys = {
        "prune.sparsity": "sparsity",
        "prune.method": "method",
        "prune.pattern": "pattern",
        "prune.effort": "effort",
        "calibration.data": "calib",
        "calibration.num_samples": "num_samples",
        "calibration.seq_len": "seq_len",
    }
    settings = [
        f"{key}={json.dumps(wish[name])}" for key, name in keys.items() if wish[name] is not None
    ]
    if wish["target"]:
        settings.append(f"prune.target={json.dumps(pairs(wish['target']))}")
    if wish["no_eval"]:
        settings.append("evaluate.perplexity=false")
    return build(override(data, settings + list(wish["set_"] or ())))


def pairs(texts: Sequence[str]) -> dict[str, str]:
    """Return the mapping of texts such as `ppl=+5%`.

    Raises:
        RecipeError: one is not of this form.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise RecipeError(f"target: {text!r} is not KEY=VALUE. Type --target ppl=+5%.")
        if name.strip() in found:
            raise RecipeError(
                f"target: {name.strip()} is given twice, as {found[name.strip()]} and "
                f"{value.strip()}. Leave one out."
            )
        found[name.strip()] = value.strip()
    return found


def limits(text: str) -> dict[str, str]:
    """Return the limits of `cpu=8GB,cuda:0=6GB`.

    Raises:
        RecipeError: not of this form.
    """
    found = {}
    for part in text.split(","):
        device, equals, size = part.strip().partition("=")
        if not equals or not device or not size:
            raise RecipeError(
                f"max_memory: {part!r} is not DEVICE=SIZE. Type --max-memory cpu=8GB."
            )
        found[device] = size
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and leave with its exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGTERM, _terminate)
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by who started us: `llmprune ... >&-`
            setattr(sys, stream, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--quiet" in given or "--json" in given:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        code = app(args=given, prog_name="llmprune", standalone_mode=False)
        sys.stdout.flush()
    except LlmpruneError as error:
        _fail(given, str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        _fail(given, _stopped(given), 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        from llmprune.checkpoint.sink import is_full

        if is_full(error):
            name = getattr(error, "filename", None)
            where = f": {name} could not be written" if name else ""
            _fail(given, f"the disk is full{where}. Free some space and type the command again.", 2)
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # a usage error
            text = error.format_message().rstrip(".")
            _fail(given, f"{text}. `llmprune --help` lists the flags.", 2)
        raise  # a fault of ours: the traceback helps to mend it, and Python exits with 1
    if code == 130:  # typer has caught the interruption
        _fail(given, _stopped(given), 130)
    sys.exit(code if isinstance(code, int) else 0)


FIRST_SPEAKS = 5.0  # seconds
STOPPED = (
    "stopped. Finished {parts} are kept: the same command resumes, and removing the folder that "
    "ends in .partial discards them."
)


def _stopped(arguments: Sequence[str]) -> str:
    """Return what to say after an interruption: pruning and recovery leave something to resume."""
    if arguments[:1] == ["recover"]:
        return STOPPED.format(parts="steps, up to the last that was saved,")
    names = {row.name for row in app.registered_commands} | {"stats"}
    return "stopped." if names & set(arguments[:1]) else STOPPED.format(parts="blocks")


def _fail(arguments: Sequence[str], message: str, code: int) -> None:
    """Print a message where people look, and in JSON mode where machines do; exit.

    Of several processes the first speaks for all: most faults are the same in each. Another one
    speaks where it is still there a while later, because the first has not failed.
    """
    if not is_first():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if code == 130:
            sys.exit(code)
        time.sleep(FIRST_SPEAKS)
        message = f"process {os.environ['RANK']}: {message}"
    if "--json" in arguments:
        print(json.dumps({"event": "error", "code": code, "message": message}), flush=True)
    print(f"error: {message}" if code == 2 else message, file=sys.stderr, flush=True)
    sys.exit(code)


def _terminate(number: int, frame: object) -> None:
    raise KeyboardInterrupt
