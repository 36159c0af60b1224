"""Measured speed: what is timed is the model's own decoding, in turns, and a loss is called one."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from llmprune import cli
from llmprune.arch.miniature import miniature_config
from llmprune.base.errors import (
    CheckpointError,
    RecipeError,
    TooLarge,
    UnsupportedModel,
    WontLoad,
)
from llmprune.base.progress import Progress
from llmprune.evaluation import latency, single_block, speed, stopwatch
from llmprune.evaluation.latency import latency_table, trunk_latency
from llmprune.evaluation.speed import bench, refusal
from llmprune.evaluation.timings import Bench, Measured, Speed, Spread, verdict

Pico = Callable[..., Path]
CPU = torch.device("cpu")
WHERE: dict[str, Any] = {"device": CPU, "dtype": torch.float32, "prompt": 16, "repeat": 1}


@pytest.fixture(autouse=True)
def small_flush(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flush next to nothing: how long a block takes is of no interest here."""
    if "flushed_bytes" not in request.node.name:
        monkeypatch.setattr(latency, "_flushed_bytes", lambda device: 16)


def speed_of(batch: int = 1, *, decode: tuple[float, ...], memory: int = 100) -> Speed:
    times = tuple(1 / value for value in decode)
    return Speed(
        batch=batch, prefill=Spread(decode), decode=Spread(decode), first_token=Spread(times),
        memory=memory,
    )  # fmt: skip


def side(name: str, *speeds: Speed, num_params: int = 1000, dtype: str = "float32") -> Measured:
    return Measured(
        name=name, num_params=num_params, file_bytes=4 * num_params, dtype=dtype, device="cpu",
        threads=2, speeds=speeds,
    )  # fmt: skip


def found(model: Measured, against: Measured | None = None, hint: str | None = None) -> Bench:
    return Bench(model=model, against=against, prompt=8, new=4, repeat=3, hint=hint)


# What numbers say


def test_ratios_are_medians_of_pairs_worked_by_hand() -> None:
    """The machine slows down by half in the last repetition: 20/10, 22/10, 12/5."""
    result = found(
        side("cut", speed_of(decode=(20.0, 22.0, 12.0))),
        side("dense", speed_of(decode=(10.0, 10.0, 5.0))),
    )
    ratios = result.ratios()[1]
    assert ratios["decode"].values == pytest.approx((2.0, 2.2, 2.4))
    assert ratios["decode"].median == pytest.approx(2.2)
    assert ratios["first token"].median == pytest.approx(2.2), "a shorter time is a higher speed"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((1.30, 1.31, 1.40), "decode 1.31 x (1.30..1.40)"),
        ((0.90, 0.94, 0.97), "decode 0.94 x (0.90..0.97), slower than dense"),
        ((0.90, 0.98, 1.02), "decode 0.98 x (0.90..1.02), slower than dense, within the spread"),
        ((0.97, 1.02, 1.05), "decode 1.02 x (0.97..1.05), within the spread"),
        ((0.999, 0.999, 1.01), "decode 1.00 x (1.00..1.01), within the spread"),
    ],
)
def test_a_loss_is_called_one_and_the_spread_is_told(values: Any, words: str) -> None:
    assert verdict("decode", Spread(values)) == words


def test_the_table_has_both_models_per_batch_and_the_shares_of_the_sizes() -> None:
    text = found(
        side("cut", speed_of(1, decode=(13.0,)), speed_of(4, decode=(40.0,)), num_params=720),
        side("dense", speed_of(1, decode=(10.0,)), speed_of(4, decode=(50.0,), memory=200)),
    ).table()
    assert "batch 1: prefill 1.30 x" in text and "decode 0.80 x (0.80..0.80), slower" in text
    assert "memory 0.50 x" in text
    assert "file 0.72 x; parameters 0.72 x" in text
    assert [line.split()[:2] for line in text.splitlines()[5:9]] == [
        ["dense", "1"], ["cut", "1"], ["dense", "4"], ["cut", "4"],
    ]  # fmt: skip
    assert "busy" not in text and "dtype's" not in text


def test_unequal_dtypes_and_a_busy_machine_are_told() -> None:
    text = found(
        side("cut", speed_of(decode=(10.0, 30.0)), dtype="bfloat16"),
        side("dense", speed_of(decode=(10.0, 11.0))),
    ).table()
    assert "bfloat16 beside float32" in text
    assert "differ 3.0 x: the machine is busy" in text


def test_everything_is_in_the_json() -> None:
    result = found(side("cut", speed_of(decode=(4.0,))), side("dense", speed_of(decode=(2.0,))))
    data = json.loads(json.dumps(result.to_dict()))
    assert data["ratios"]["1"]["decode"]["median"] == 2.0
    assert data["model"]["speeds"][0]["decode"] == {
        "median": 4.0, "low": 4.0, "high": 4.0, "values": [4.0],
    }  # fmt: skip
    assert data["sizes"] == {"file": 1.0, "parameters": 1.0}


# What is timed


def slow_decode(model: Any, ids_BT: torch.Tensor, new: int) -> list[list[int]]:
    """Decode greedily without a cache: the whole text again for every token."""
    with torch.no_grad():
        for _ in range(new):
            last = model(input_ids=ids_BT, use_cache=False).logits[:, -1:].argmax(-1)
            ids_BT = torch.cat([ids_BT, last], 1)
    return ids_BT.tolist()


def test_a_repetition_is_greedy_decoding_with_the_cache(
    make_model: Any, model_type: str, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = make_model(model_type), []
    own = type(model).forward

    def watched(self: Any, **given: Any) -> Any:
        seen.append(given["input_ids"])
        return own(self, **given)

    monkeypatch.setattr(model, "forward", watched.__get__(model))
    monkeypatch.setattr(stopwatch, "_parameters", lambda model: {"logits_to_keep": None})
    seconds = stopwatch.repetition(model, tokens[:2, :12], 5)
    monkeypatch.undo()
    assert [list(ids.shape) for ids in seen] == [[2, 12]] + 5 * [[2, 1]]
    assert torch.cat(seen, 1).tolist() == slow_decode(model, tokens[:2, :12], 5)
    assert 0 < seconds["prefill"] <= seconds["first"] and seconds["decode"] > 0


def test_a_model_without_a_cache_is_refused() -> None:
    class Forgetful(torch.nn.Module):
        def forward(self, input_ids: Any, use_cache: bool) -> Any:
            return type("Output", (), {"logits": torch.zeros(1, 1, 4)})()

    with pytest.raises(stopwatch.Refused, match="Forgetful") as refused:
        stopwatch.repetition(Forgetful(), torch.ones(1, 4, dtype=torch.long), 2)
    assert refused.value.kind == "cache"


def test_memory_is_the_weights_once_and_what_the_process_grows() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(256, 256, bias=False), torch.nn.Linear(256, 256))
    model[1].weight = model[0].weight  # tied: held once
    held = (256 * 256 + 256) * 4

    def work() -> None:
        block = torch.ones(50_000_000, dtype=torch.uint8)
        time.sleep(0.05)
        del block

    taken = stopwatch.peak_memory(model, CPU, work)
    assert held + 45e6 < taken < held + 90e6
    assert held <= stopwatch.peak_memory(model, CPU, lambda: None) < held + 20e6


# The process that measures


def ask(*lines: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what the measuring process answers, run in this one."""
    said: list[dict[str, Any]] = []
    stopwatch.serve(io.StringIO("".join(json.dumps(line) + "\n" for line in lines)), said.append)
    return said


def job(folder: Path, **other: Any) -> dict[str, Any]:
    common = {"device": "cpu", "dtype": "auto", "trust_remote_code": False}
    return {"folder": str(folder), **common, **other}


def test_requests_are_answered_line_by_line(pico: Pico) -> None:
    asked = {"batch": 2, "prompt": 6, "new": 3, "watch": False}
    facts, times, memory = ask(job(pico("llama")), asked, {**asked, "watch": True})
    assert facts["dtype"] == "float32" and facts["device"] == "cpu" and facts["threads"] >= 1
    assert times.keys() == {"prefill", "first", "decode"}
    assert memory["memory"] >= 4 * facts["num_params"]


def test_weights_lie_in_memory_where_the_allocator_puts_them(pico: Pico) -> None:
    """Mapped from a file they begin at odd addresses; tied ones stay one."""
    model, _ = stopwatch.load(job(pico("llama")))
    assert {value.data_ptr() % 64 for value in model.parameters()} == {0}
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_cannot_be_measured_is_refused_in_words(pico: Pico, tmp_path: Path) -> None:
    asked = {"batch": 1, "prompt": 6, "new": 3, "watch": False}
    assert ask(job(pico("llama"), device="nosuch"))[0]["refused"] == "device"
    assert ask(job(tmp_path))[0]["refused"] == "load"
    assert ask(job(pico("gpt2")), {**asked, "prompt": 500})[1]["refused"] == "run"


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("device", RecipeError, "--device cpu"),
        ("memory", TooLarge, "smaller --batch"),
        ("cache", UnsupportedModel, "past_key_values"),
        ("load", WontLoad, "llmprune gate"),
        ("run", WontLoad, "--dtype float32"),
    ],
)
def test_a_refusal_becomes_an_error_with_what_to_do(kind: str, error: type, words: str) -> None:
    made = refusal("folder", kind, "the reason\nmore")
    assert type(made) is error and words in str(made) and "the reason" in str(made)


def test_two_models_take_turns_and_the_first_to_go_alternates() -> None:
    class Fake:
        def __init__(self, name: str) -> None:
            self.name = name

        def ask(self, request: Any) -> dict[str, float]:
            calls.append(self.name + ("m" if request["watch"] else ""))
            number = len(calls)
            times = {"prefill": 8.0, "first": 9.0, "decode": float(number)}
            return {"memory": 5} if request["watch"] else times

    calls: list[str] = []
    workers: Any = [Fake("a"), Fake("b")]
    speeds = speed._take_turns(workers, [2], {"prompt": 16, "new": 3}, 3, Progress("quiet"))
    assert calls == ["b", "a", "a", "b", "b", "a", "a", "b", "am", "bm"]
    (own,), (other,) = speeds
    assert own.prefill.values == (4.0,) * 3, "2 sequences of 16 tokens in 8 s"
    assert own.decode.values == (6 / 3, 6 / 6, 6 / 7), "the warm-up is not counted"
    assert other.decode.values == (6 / 4, 6 / 5, 6 / 8)
    assert own.memory == 5


def test_a_model_beside_itself_in_processes_of_their_own(
    pico: Pico, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(pico("llama"))
    flags = ["--prompt", "8", "--new", "4", "--repeat", "2", "--batch", "1,2", "--device", "cpu"]
    with pytest.raises(SystemExit) as left:
        cli.main(["bench", folder, "--against", folder, *flags, "--json"])
    assert not left.value.code
    data = json.loads(capsys.readouterr().out)
    assert data["sizes"] == {"file": 1.0, "parameters": 1.0}
    assert [row["batch"] for row in data["model"]["speeds"]] == [1, 2]
    assert len(data["ratios"]["2"]["decode"]["values"]) == 2
    assert data["model"]["file_bytes"] == (pico("llama") / "model.safetensors").stat().st_size


def test_a_process_that_ends_is_told(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'ImportError: no torch' >&2\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(WontLoad, match="code 3: ImportError: no torch"):
        bench(pico("llama"), prompt=4, new=2)
    python.write_text("#!/bin/sh\nkill -9 $$\n")
    with pytest.raises(TooLarge, match="does not fit"):
        bench(pico("llama"), prompt=4, new=2)


def test_the_measuring_script_imports_nothing_of_ours(pico: Pico) -> None:
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[1]); "
        "print([name for name in sys.modules if name.startswith('llmprune')])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, stopwatch.__file__], capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr


# Wrong inputs, and what to compare with


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"batch": (1, 0)}, "batch: 0 measures nothing. Give 1 or more, as in --batch 4"),
        ({"batch": ()}, "batch: nothing measures nothing"),
        ({"new": 0}, "new: 0"),
        ({"repeat": -1}, "repeat: -1"),
        ({"prompt": 60, "new": 5}, "are 65, and .* takes 64. Type --prompt 59"),
        ({"prompt": 1, "new": 64}, "Type --prompt 32 --new 32"),
        ({"dtype": "int8"}, "'int8' is none of auto, float32"),
    ],
)
def test_wishes_that_cannot_be_met_are_refused(pico: Pico, wish: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        bench(pico("llama"), **wish)


def test_what_fits_exactly_is_not_refused(pico: Pico) -> None:
    from llmprune.checkpoint.locate import open_source

    speed._check_length(open_source(str(pico("llama"))), 59, 5, False)


@pytest.mark.parametrize(
    "arguments", [["--batch", "x"], ["--batch", "0"], ["--prompt", "99999"], ["--against", "/"]]
)
def test_the_command_ends_with_2_and_no_traceback(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["bench", "demo", *arguments])
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is empty"):
        bench(tmp_path)


def test_models_that_do_not_fit_together_are_refused(
    pico: Pico, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    size = (pico("llama") / "model.safetensors").stat().st_size
    free = type("Memory", (), {"available": int(1.5 * size)})
    monkeypatch.setattr(psutil, "virtual_memory", free)
    from llmprune.checkpoint.locate import open_source

    source = open_source(str(pico("llama")))
    speed._check_memory([source], "auto")
    speed._check_memory([source, source], "bfloat16")
    with pytest.raises(TooLarge, match="take turns"):
        speed._check_memory([source, source], "auto")


def test_a_result_says_what_to_compare_it_with_where_that_lies(tmp_path: Path, pico: Pico) -> None:
    from llmprune.checkpoint.source import Source

    result = Source(name="out", folder=tmp_path, entries={})
    assert speed._hint(result) is None
    (tmp_path / "llmprune").mkdir()
    record = tmp_path / "llmprune" / "run.json"
    dense = {"name": "x", "folder": str(pico("llama"))}
    record.write_text(json.dumps({"source": {"folder": "/gone"}, "origin": dense}))
    hint = speed._hint(result)
    assert hint and hint.endswith(f"llmprune bench out --against {pico('llama')}")
    assert hint in found(side("out", speed_of(decode=(1.0,))), hint=hint).table()
    record.write_text(json.dumps({"source": {"name": "x", "folder": str(tmp_path / "gone")}}))
    assert speed._hint(result) is None


# Single blocks


@pytest.mark.parametrize("block", [0, 1])
def test_a_single_block_is_called_as_its_model_calls_it(
    model_type: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a whole model, where a hook sees the arguments, and alone: equal shapes and lengths."""
    from transformers import AutoModelForCausalLM

    def shapes(given: Any) -> Any:
        if isinstance(given, torch.Tensor):
            return tuple(given.shape)
        if isinstance(given, (tuple, list)):
            return [shapes(value) for value in given]
        if isinstance(given, dict):
            return {name: shapes(value) for name, value in given.items()}
        is_cache = hasattr(given, "get_seq_length")
        return given.get_seq_length(block) if is_cache else str(given)

    config = miniature_config(AutoConfig.for_model(model_type))
    config.num_hidden_layers = 2
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    built = single_block.build(config, torch.float32, False)
    seen: list[Any] = []
    model.get_submodule(built.family.blocks)[block].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(shapes([args, kwargs])), with_kwargs=True
    )
    with torch.inference_mode():
        output = model(input_ids=torch.ones(3, 16, dtype=torch.long), use_cache=True)
        one = torch.ones(3, 1, dtype=torch.long)
        model(input_ids=one, past_key_values=output.past_key_values, use_cache=True)
    calls: list[Any] = []

    def watched(module: Any, hidden: Any, given: Any, cache: Any) -> float:
        calls.append(shapes([[hidden, *given.args], given.kwargs]))
        return timed(module, hidden, given, cache)

    timed = single_block._timed
    monkeypatch.setattr(single_block, "_timed", watched)
    latency_table(config, [{}], **WHERE, batch=3, block=block)
    assert calls[0] == seen[0]
    assert calls[1:] and all(call == seen[1] for call in calls[1:]), "the cache never grows"


def test_candidates_have_their_own_sizes_and_share_one_pool() -> None:
    config = miniature_config(AutoConfig.for_model("llama"))
    pool = single_block.Pool(CPU, torch.float32)
    blocks = []
    for width in (48, 64):
        changed = latency._changed(config, {"intermediate_size": width})
        blocks.append(single_block.build(changed, torch.float32, False).blocks[0])
        pool.add(blocks[-1])
    pool.fill()
    assert [block.mlp.up_proj.weight.shape[0] for block in blocks] == [48, 64]
    assert config.intermediate_size == 64, "the config given is as it was"
    homes = {b.mlp.up_proj.weight.untyped_storage().data_ptr() for b in blocks}
    assert len(homes) == 1
    within = [p.data_ptr() for p in blocks[1].parameters() if p.dim() > 1]
    assert len(set(within)) == len(within), "weights of one block do not overlap"
    assert bool((blocks[0].input_layernorm.weight == 1).all())


def test_the_order_of_candidates_turns_and_each_is_called_before_it_is_timed() -> None:
    calls: list[str] = []

    def make(name: str, seconds: list[float]) -> Callable[[], float]:
        def call() -> float:
            calls.append(name)
            return seconds.pop(0)

        return call

    # two warm-ups, then per round one call that is not counted and one that is
    first = make("a", [9, 9, 9, 1.0, 9, 5.0, 9, 3.0])
    second = make("b", [9, 9, 9, 2.0, 9, 8.0, 9, 2.5])
    assert latency._medians([first, second], 3, CPU) == [3.0, 2.5]
    assert "".join(calls) == "aabb" + "aabb" + "bbaa" + "aabb"


def test_flushed_bytes_are_twice_the_last_cache_up_to_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "LAST_CACHE", tmp_path / "size")
    assert latency._flushed_bytes(CPU) == latency.FLUSHED
    for text, expected in (("2048K\n", 2**22), ("999999K\n", 2**30), ("odd\n", latency.FLUSHED)):
        (tmp_path / "size").write_text(text)
        assert latency._flushed_bytes(CPU) == expected


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_blocks_and_trunk_of_every_family_have_a_latency(model_type: str, phase: Any) -> None:
    config = miniature_config(AutoConfig.for_model(model_type))
    times = latency_table(config.to_dict(), [{}, {}], **WHERE, phase=phase)
    assert len(times) == 2 and min(times) > 0
    assert trunk_latency(config, **WHERE, phase=phase) > 0


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"intermediate_sizes": 4}, "is no key of a llama config. Did you mean intermediate_size"),
        ({"intermediate_size": 0}, "intermediate_size 0 leaves nothing to run"),
        ({"num_attention_heads": 3}, "a block of .*3.* cannot run"),
    ],
)
def test_sizes_that_no_block_has_are_refused(sizes: Any, words: str) -> None:
    config = miniature_config(AutoConfig.for_model("llama", num_key_value_heads=2))
    with pytest.raises(RecipeError, match=words):
        latency_table(config, [sizes], **WHERE)


def test_counts_and_lengths_of_single_blocks_are_checked() -> None:
    config = miniature_config(AutoConfig.for_model("llama"))
    with pytest.raises(RecipeError, match="batch: 0"):
        latency_table(config, [{}], **WHERE, batch=0)
    with pytest.raises(RecipeError, match="65 tokens are more than this llama takes"):
        latency_table(config, [{}], **{**WHERE, "prompt": 64})
    with pytest.raises(RecipeError, match="batch: 0"):
        trunk_latency(config, **WHERE, batch=0)
