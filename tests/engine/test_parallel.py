"""Several processes share calibration: the same masks as one, and a run that survives a death.

Most runs here are of threads that take turns and send one another what processes would. One starts
real processes.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmprune import Report, api, cli
from llmprune.base.errors import LostProcess, NumericalError, RecipeError
from llmprune.base.progress import Progress
from llmprune.base.world import World, _packed, _unpacked
from llmprune.engine import gradients, side_by_side
from llmprune.engine.following import _Share, follow
from llmprune.engine.opening import open_plan
from llmprune.steps import run_streamed
from llmprune.walk.forward import embed
from llmprune.walk.observation import Sums, observe, watch_batches
from llmprune.walk.sharing import Others, await_end, leading

NUM_SAMPLES = 5


def carried(message: Any) -> list[torch.Tensor]:
    """Return what gloo would carry, copied as it would be."""
    return [part.clone() for part in _packed(message)]


class Table:
    """Where the threads of a run sit: one works at a time, the others wait for a message."""

    def __init__(self, size: int) -> None:
        self.orders: list[queue.Queue[Any]] = [queue.Queue() for _ in range(size)]
        self.answers: list[queue.Queue[Any]] = [queue.Queue() for _ in range(size)]
        self.letters: list[queue.Queue[Any]] = [queue.Queue() for _ in range(size)]
        self.turn = threading.Lock()

    def wait(self, messages: queue.Queue[Any]) -> Any:
        self.turn.release()
        try:
            return _unpacked(messages.get(timeout=60))
        finally:
            self.turn.acquire()


@dataclass(frozen=True, kw_only=True)
class Seat(World):
    """A process played by a thread; its messages are the bytes that gloo would carry."""

    table: Table = field(default_factory=lambda: Table(1))

    def tell(self, message: Any) -> None:
        for orders in self.table.orders[1:]:
            orders.put(carried(message))

    def told(self) -> Any:
        return self.table.wait(self.table.orders[self.rank])

    def answer(self, message: Any) -> None:
        self.table.answers[self.rank].put(carried(message))

    def send(self, rank: int, message: Any) -> None:
        self.table.letters[rank].put(carried(message))

    def sent(self) -> Any:
        return self.table.wait(self.table.letters[self.rank])

    def answer_of(self, rank: int) -> Any:
        return self.table.wait(self.table.answers[rank])


def wish_of(model: Path, text: Path, out: Path, method: str, *settings: str, **more: Any) -> Any:
    """Return the recipe that all runs here share, but for the method."""
    return api.make_recipe(
        str(model),
        method=method,
        **{"sparsity": 0.5, **more},
        calib=str(text),
        num_samples=NUM_SAMPLES,
        seq_len=16,
        out=out,
        device="cpu",
        settings=["evaluate.perplexity=false", "calibration.micro_batch=1", *settings],
    )


def alone(recipe: Any) -> Any:
    return run_streamed(open_plan(recipe), Progress("quiet"))


def together(size: int, recipe: Any) -> None:
    """Prune among some threads that play processes."""
    among(
        size,
        recipe,
        lambda others: run_streamed(open_plan(recipe), Progress("quiet"), others=others),
    )


def among(size: int, recipe: Any, lead: Callable[[Others], Any]) -> None:
    """Have some threads that play processes do what the first one, `lead`, tells them."""
    table, faults = Table(size), []

    def sit(rank: int) -> None:
        with table.turn:
            try:
                seat = Seat(rank=rank, size=size, table=table)
                follow(seat, open_plan(recipe), Path(f"{recipe.out}.partial"))
            except BaseException as error:  # shown by the test that started this thread
                faults.append(error)

    threads = [threading.Thread(target=sit, args=(rank,), daemon=True) for rank in range(1, size)]
    with table.turn:
        for thread in threads:
            thread.start()
        with leading(Seat(rank=0, size=size, table=table)) as others:
            lead(others)
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert not faults, faults


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*.safetensors"))
    }


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    paths = sorted(folder.glob("*.safetensors"))
    return {name: value for path in paths for name, value in load_file(path).items()}


def assert_near(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Check that two results differ by the rounding of Gram matrices at most."""
    alike = [((ours[name] == 0) == (theirs[name] == 0)).float().mean() for name in ours]
    assert min(alike) > 0.99
    near = [torch.isclose(ours[n], theirs[n], atol=1e-4).float().mean() for n in ours]
    assert min(near) > 0.98


@pytest.mark.parametrize(
    ("method", "settings", "more"),
    [
        pytest.param("wanda", (), {}, id="wanda"),
        pytest.param("wanda", ("prune.allocation=owl",), {}, id="owl"),
        pytest.param("flap", (), {"pattern": "ffn-channels", "sparsity": 0.2}, id="shrunk"),
    ],
)
def test_three_processes_with_uneven_shares_write_the_bytes_of_one(
    method: str,
    settings: tuple[str, ...],
    more: dict[str, Any],
    pico: Any,
    text_file: Path,
    tmp_path: Path,
    quick_gate: None,
) -> None:
    wish = partial(wish_of, pico("llama"), text_file)
    together(3, wish(tmp_path / "three", method, *settings, **more))
    alone(wish(tmp_path / "one", method, *settings, **more))
    expected = bytes_of(tmp_path / "one")
    assert len(expected) >= 4 and bytes_of(tmp_path / "three") == expected
    run = json.loads((tmp_path / "three" / "llmprune" / "run.json").read_text())
    assert run["world_size"] == 3 and run["micro_batch"] == 1


def test_gram_matrices_of_several_processes_agree_to_rounding(
    pico: Any, text_file: Path, tmp_path: Path, quick_gate: None
) -> None:
    wish = partial(wish_of, pico("llama"), text_file)
    together(2, wish(tmp_path / "two", "sparsegpt"))
    alone(wish(tmp_path / "one", "sparsegpt"))
    assert_near(tensors_of(tmp_path / "one"), tensors_of(tmp_path / "two"))


@pytest.mark.parametrize(
    ("method", "more"),
    [
        pytest.param("sparsegpt", {}, id="sparsegpt"),
        pytest.param("alps", {"pattern": "2:4"}, id="alps"),
    ],
)
def test_groups_solved_by_several_processes_are_those_that_one_solves(
    method: str,
    more: dict[str, Any],
    pico: Any,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quick_gate: None,
) -> None:
    solved: list[tuple[int, str]] = []
    done = side_by_side.Job.done

    def counted(self: Any, cutter: Any, block: Any) -> Any:
        solved.append((threading.get_ident(), self.group.tap))
        return done(self, cutter, block)

    monkeypatch.setattr(side_by_side.Job, "done", counted)
    wish = partial(wish_of, pico("llama"), text_file, method=method, **more)
    together(3, wish(out=tmp_path / "one"))
    assert len({thread for thread, _ in solved}) == 1  # matrices this small stay where they are
    taps = sorted(tap for _, tap in solved)
    solved.clear()
    monkeypatch.setattr(side_by_side, "LEAST", 1)
    together(3, wish(out=tmp_path / "many"))
    assert len({thread for thread, _ in solved}) == 3
    assert sorted(tap for _, tap in solved) == taps
    assert bytes_of(tmp_path / "many") == bytes_of(tmp_path / "one")
    one, many = (Report.read(tmp_path / name).data["blocks"] for name in ("one", "many"))
    for before, after in zip(one, many, strict=True):
        assert before["sites"] == after["sites"] and before["spreads"] == after["spreads"]


def test_gradients_of_several_processes_are_those_of_one_and_are_resumed(
    pico: Any,
    text_file: Path,
    tokens: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of five sequences three processes take three, then two: the last one has none of those."""
    monkeypatch.setattr(gradients, "sequences_at_once", lambda *given: 1)
    recipe = wish_of(pico("llama"), text_file, tmp_path / "out", "gblm")
    tokens_NT = tokens[:NUM_SAMPLES]

    def take(folder: str, size: int = 3) -> gradients.Gradients:
        opened, home = open_plan(recipe), tmp_path / folder
        home.mkdir(exist_ok=True)
        found: list[gradients.Gradients] = []

        def lead(others: Others) -> None:
            found.append(
                gradients.take_gradients(
                    opened.blocks,
                    tokens_NT,
                    ["grad_abs", "grad_sq"],
                    folder=home,
                    progress=Progress("quiet"),
                    others=others,
                )
            )

        among(size, recipe, lead)
        return found[0]

    one, three = take("one", 1), take("three")
    for index in range(len(open_plan(recipe).blocks)):
        for linear, stats in one.of(index).items():
            assert three.of(index)[linear].num_sequences == NUM_SAMPLES
            for name, value in stats.values.items():
                torch.testing.assert_close(three.of(index)[linear][name], value)
    kept: list[int] = []
    keep = gradients.Gradients.keep

    def keep_three(self: Any, index: int, stats: Any) -> None:
        kept.append(index)
        if len(kept) == 4:
            raise NumericalError("stopped between two blocks of the second group")
        keep(self, index, stats)

    monkeypatch.setattr(gradients.Gradients, "keep", keep_three)
    with pytest.raises(NumericalError, match="stopped"):
        take("resumed")
    take("resumed")
    assert bytes_of(tmp_path / "resumed") == bytes_of(tmp_path / "three")


@pytest.mark.parametrize("method", ["gblm", "llm-pruner"])
def test_a_run_of_several_processes_by_gradients_is_near_that_of_one(
    method: str, pico: Any, text_file: Path, tmp_path: Path, quick_gate: None
) -> None:
    wish = partial(wish_of, pico("llama"), text_file, method=method)
    together(2, wish(out=tmp_path / "two"))
    alone(wish(out=tmp_path / "one"))
    assert_near(tensors_of(tmp_path / "one"), tensors_of(tmp_path / "two"))


def test_a_fault_amid_gradients_ends_all(
    pico: Any, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_gate: None
) -> None:
    def broken(self: _Share, **given: Any) -> Any:
        yield None
        raise NumericalError(f"a gradient in process {self.world.rank}")

    monkeypatch.setattr(_Share, "gradients", broken)
    with pytest.raises(NumericalError, match="a gradient in process 1"):
        together(3, wish_of(pico("llama"), text_file, tmp_path / "three", "gblm"))


def test_a_fault_of_another_process_is_told_by_the_first_and_ends_all(
    pico: Any, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_gate: None
) -> None:
    def broken(self: _Share, index: int, needs: Any, dense: bool) -> Any:
        raise NumericalError(f"activation of block {index} in process {self.world.rank}")

    monkeypatch.setattr(_Share, "observe", broken)
    with pytest.raises(NumericalError, match="block 0 in process 1"):
        together(2, wish_of(pico("llama"), text_file, tmp_path / "two", "wanda"))
    assert not (tmp_path / "two").exists() and not (tmp_path / "two.partial").exists()


def test_the_first_process_speaks_for_all_and_others_where_it_does_not_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("llmprune.cli.time.sleep", slept.append)
    monkeypatch.setattr("llmprune.cli.signal.signal", lambda number, handler: None)
    for rank, code, said in (
        ("0", 2, "error: wrong\n"),
        ("1", 2, "error: process 1: wrong\n"),
        ("1", 130, ""),
    ):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as ended:
            cli._fail([], "wrong", code)
        assert ended.value.code == code and capsys.readouterr().err == said
    assert slept == [cli.FIRST_SPEAKS]


def test_the_others_hear_whether_the_first_process_has_failed() -> None:
    table = Table(2)
    first, other = (Seat(rank=rank, size=2, table=table) for rank in range(2))
    with table.turn:
        with leading(first):
            pass
        await_end(other)
        with pytest.raises(RecipeError), leading(first):
            raise RecipeError("wrong")
        with pytest.raises(LostProcess, match="first process has stopped"):
            await_end(other)


def test_the_plan_says_that_every_process_takes_memory(
    pico: Any, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = wish_of(pico("llama"), text_file, tmp_path / "out", "wanda")
    assert "processes here" not in repr(open_plan(recipe).plan)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "that in each of the 3 processes here" in repr(open_plan(recipe).plan)


@pytest.mark.parametrize("count", [0, 1, 2, 5, 7])
def test_shares_are_contiguous_and_leave_nothing_out(count: int) -> None:
    for size in (1, 2, 3, 4):
        items = list(range(count))
        shares = [items[World(rank=rank, size=size).share(count)] for rank in range(size)]
        assert [item for share in shares for item in share] == items
        lengths = [len(share) for share in shares]
        assert max(lengths) - min(lengths) <= 1 and lengths == sorted(lengths, reverse=True)


def test_sums_that_were_sent_merge_to_the_bits_of_those_taken_in_one(
    pico: Any, streamed: Callable[..., Any], tokens: torch.Tensor
) -> None:
    blocks = streamed(pico("llama"))
    whole = embed(blocks, tokens, 1)
    with blocks.open(0) as block:
        names = ("col_sq", "col_mean", "col_var", "col_abs", "gram")
        needs = {tap.name: names for tap in block.anatomy.taps}
        expected = observe(block, whole, needs, dense=False).stats
        first = Sums(needs)
        watch_batches(block, embed(blocks, tokens[:4], 1), needs, first, dense=False)
        rest = Sums(needs, keep=True)
        watch_batches(block, embed(blocks, tokens[4:], 1), needs, rest, dense=False)
        for piece in rest.pieces():
            first.merge(piece)
    for tap, stats in first.result().items():
        assert stats.num_tokens == tokens.numel()
        for name in names:
            if name == "gram":
                torch.testing.assert_close(stats[name], expected[tap][name])
            else:
                assert torch.equal(stats[name], expected[tap][name]), (tap, name)


LAUNCHED = '''
"""Fork processes as torchrun starts them, after the slow imports: three that prune, two of which
one dies, and two that resume."""
import os, socket, sys
import torch, transformers
from llmprune import api
from llmprune.engine import following, side_by_side
import llmprune.steps

side_by_side.LEAST = 1  # groups of any size are sent

class Proven:
    to_dict = staticmethod(lambda: {})
llmprune.steps.pass_gate = lambda *args, **kwargs: Proven()
model, text, out = sys.argv[1:]

def prune(method, name, *settings):
    return api.prune(
        model, method=method, sparsity=0.5, calib=text, num_samples=5, seq_len=16,
        out=f"{out}/{name}", device="cpu", quiet=True,
        settings=["evaluate.perplexity=false", "calibration.micro_batch=1", *settings],
    )

def all_of():
    plan = api.plan(model, method="wanda", sparsity=0.5, calib=text, num_samples=5, seq_len=16,
        out=f"{out}/wanda", device="cpu",
        settings=["evaluate.perplexity=false", "calibration.micro_batch=1"])
    report = api.run(plan, quiet=True)
    assert report.data["out"].endswith("wanda"), report
    prune("sparsegpt", "sparsegpt")
    prune("gblm", "gblm")
    prune("wanda", "owl", "prune.allocation=owl")

def dies():
    observe = following._Share.observe
    def dying(self, index, needs, dense):
        if index == 1:
            os._exit(7)
        return observe(self, index, needs, dense)
    following._Share.observe = dying
    prune("wanda", "resumed")

def launch(size, work):
    """Return the exit codes of some processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(size):
        if not (child := os.fork()):
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
                "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            code = 1
            try:
                work()
                code = 0
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", flush=True)
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

print("all", launch(3, all_of), flush=True)
print("dies", launch(2, dies), flush=True)
whole = os.listdir(f"{out}/resumed.partial/llmprune/records")
print("whole", sorted(name for name in whole if name.endswith(".json")), flush=True)
print("again", launch(2, lambda: prune("wanda", "resumed")), flush=True)
'''


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked here to start quickly")
def test_processes_write_the_bytes_of_one_and_resume_after_a_death(
    pico: Any, text_file: Path, tmp_path: Path, quick_gate: None
) -> None:
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED)
    running = subprocess.Popen(
        [sys.executable, str(script), str(pico("llama")), str(text_file), str(tmp_path / "many")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wish = partial(wish_of, pico("llama"), text_file)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone(wish(tmp_path / "wanda", "wanda"))
        alone(wish(tmp_path / "owl", "wanda", "prune.allocation=owl"))
        alone(wish(tmp_path / "sparsegpt", "sparsegpt"))
        alone(wish(tmp_path / "gblm", "gblm"))
    finally:
        torch.set_num_threads(before)
    said, _ = running.communicate(timeout=300)
    assert "all [0, 0, 0]" in said and "again [0, 0]" in said, said
    assert "dies [1, 7]" in said and f"{LostProcess.__name__}: another process" in said, said
    assert "whole ['00001.json']" in said, said  # the block before it
    expected = bytes_of(tmp_path / "wanda")
    assert bytes_of(tmp_path / "many" / "wanda") == expected
    assert bytes_of(tmp_path / "many" / "resumed") == expected
    assert bytes_of(tmp_path / "many" / "owl") == bytes_of(tmp_path / "owl")
    for name in ("sparsegpt", "gblm"):
        assert_near(tensors_of(tmp_path / "many" / name), tensors_of(tmp_path / name))


def test_another_number_of_processes_does_not_resume(
    pico: Any, text_file: Path, tmp_path: Path, quick_gate: None
) -> None:
    recipe = wish_of(pico("llama"), text_file, tmp_path / "two", "wanda")
    together(2, recipe)
    (tmp_path / "two").rename(tmp_path / "two.partial")
    (tmp_path / "two.partial" / "llmprune" / "records").mkdir()
    with pytest.raises(RecipeError, match="world_size: 2 then, 1 now"):
        alone(recipe)
