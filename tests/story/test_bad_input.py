"""Every wrong wish and every damaged input ends with code 2 and one message that helps."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import torch

from llmprune import cli
from llmprune.checkpoint import source as sources
from llmprune.engine.records import Records
from llmprune.engine.solving import Cutter
from tests.story.conftest import Command, Ended

Snapshot = dict[str, tuple[int, bytes]]
Refused = Callable[..., Ended]


def snapshot(folder: Path) -> Snapshot:
    """Return times and bytes of all that is in a folder, itself included."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in (folder, *folder.rglob("*"))
    }


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of the command; where it may leave nothing."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def refused(command: Command, text_file: Path, home: Path) -> Refused:
    """Run the command on a source and check that it is refused as a user's error should be."""

    def run(source: object, *more: object, says: tuple[str, ...], whole: bool = False) -> Ended:
        usual = ("--sparsity", 0.5, "--calib", text_file, "--num-samples", 4, "--seq-len", 16)
        usual = () if whole else (*usual, "--no-eval", "--out", home / "out")
        folder = Path(str(source)) if Path(str(source)).is_dir() else None
        before = {} if folder is None else snapshot(folder)
        at_home = snapshot(home)
        ended = command("--model", source, *usual, *more)
        assert ended.code == 2, ended
        assert_one_message(ended.err)
        for part in says:
            assert part in ended.err
        assert snapshot(home).keys() == at_home.keys(), "something was left behind"
        if folder is not None:
            assert snapshot(folder) == before, "the source was touched"
        return ended

    return run


def assert_one_message(err: str) -> None:
    """Check that stderr holds one error, beside warnings, and no traceback."""
    assert "Traceback" not in err
    starts = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(starts) == 1, err
    assert err.replace("warning: ", "error: ").startswith("error: "), err


# Wishes.


@pytest.mark.parametrize("value", ["1", "1.5", "-0.1", "50"])
def test_a_sparsity_outside_0_to_1(value: str, source: Path, refused: Refused) -> None:
    says = ["steps[0].prune.sparsity", value, "at least 0 and below 1"]
    if value == "50":
        says.append("did you mean 0.5?")
    refused(source, "--sparsity", value, says=tuple(says))


WISHES = {
    "4:2": (("--pattern", "4:2"), ("keep 4 of every 2", "'2:4'")),
    "0:4": (("--pattern", "0:4"), ("keep 0 of every 4", "0 < N < M")),
    "a width that 7 does not divide": (
        ("--pattern", "3:7", "--sparsity", str(4 / 7)),
        ("3:7", "model.layers.0.self_attn.q_proj", "32 columns", "prune.skip"),
    ),
    "sparsity against N:M": (
        ("--pattern", "2:4", "--sparsity", "0.6"),
        ("0.6 contradicts pattern '2:4'", "removes 0.5", "Leave sparsity out"),
    ),
    "unknown method": (("--method", "wnada"), ("'wnada'", "Did you mean 'wanda'", "magnitude")),
    "unknown pattern": (("--pattern", "unstructred"), ("'unstructred'", "unstructured", "2:4")),
    "unknown text": (("--calib", "demoo"), ("calibration.data", "'demoo'", "Did you mean 'demo'")),
    "unknown key": (
        ("--set", "prune.sparsty=0.5"),
        ("steps[0].prune.sparsty", "Did you mean 'sparsity'"),
    ),
    "key of another section": (
        ("--set", "num_samples=4"),
        ("num_samples: there is no such key", "calibration.num_samples"),
    ),
    "not an assignment": (("--set", "seed"), ("'seed' is not an assignment", "KEY=VALUE")),
    "unknown flag": (("--sparsiti", "0.5"), ("--sparsiti", "--sparsity", "--help")),
    "value of another type": (("--num-samples", "many"), ("--num-samples", "integer")),
    "unknown dtype": (("--dtype", "float8"), ("dtype", "'float8'", "bfloat16")),
    "unknown device": (("--device", "gpu"), ("device: 'gpu'", "--device cpu")),
    "limits that are none": (("--max-memory", "8GB"), ("max_memory", "cpu=8GB")),
    "size that is none": (("--max-memory", "cpu=lots"), ("max_memory", "'lots'", "8GB")),
    "no samples": (("--num-samples", "0"), ("calibration.num_samples", "0")),
    "longer than the model takes": (
        ("--seq-len", "65"),
        ("calibration.seq_len: 65", "64 tokens", "--seq-len 64"),
    ),
    "shrunk single weights": (
        ("--set", "prune.form=shrunk"),
        ("prune.form", "ffn-channels", "masked"),
    ),
    "nothing to prune": (("--set", "prune.skip=['*']"), ("prune.skip", "nothing to prune")),
    "more channels than there are": (
        ("--pattern", "ffn-channels", "--sparsity", "0.9"),
        ("prune.sparsity: 0.9", "more than ffn-channels can give", "at most 0.62"),
    ),
    "a scale that linears do not share": (
        ("--set", "prune.allocation=global"),
        ("prune.allocation: global", "wanda", "--method magnitude-global"),
    ),
    "shares that N:M fixes": (
        ("--method", "magnitude-global", "--pattern", "2:4"),
        ("prune.allocation: 2:4 fixes", "--method magnitude"),
    ),
    "tiles that do not fill": (
        ("--pattern", "24x16"),
        ("24x16 tiles", "model.layers.0.self_attn.q_proj", "32 x 32", "8x16", "prune.skip"),
    ),
    "a tile of one weight": (("--pattern", "1x1"), ("'1x1' is no tile", "unstructured")),
    "a share of no linear": (
        ("--set", "prune.sparsities={'*down': 0.3}"),
        ("prune.sparsities: '*down' names no linear", "mlp.down_proj"),
    ),
    "shares that miss the total": (
        ("--set", "prune.sparsities={'*mlp*': 0.9}"),
        ("prune.sparsities", "can be reached", "sparsity is 0.5", "--sparsity"),
    ),
    "a floor above the total": (
        ("--method", "magnitude-global", "--set", "prune.min_keep=0.6"),
        ("prune.sparsity: 0.5 cannot be removed", "prune.min_keep"),
    ),
    "text that is not there": (
        ("--calib", "nowhere.txt"),
        ("calibration.data", "'nowhere.txt'", "demo"),
    ),
    "too little memory": (("--max-memory", "cpu=1MB"), ("on cpu", "0.00 GB", "--max-memory cpu=")),
}


@pytest.mark.parametrize("name", WISHES)
def test_a_wish_that_cannot_be_met(name: str, source: Path, refused: Refused) -> None:
    wish, says = WISHES[name]
    refused(source, *wish, says=says)


def test_sparsity_is_asked_for_where_nothing_fixes_it(source: Path, refused: Refused) -> None:
    refused(source, says=("steps[0].prune.sparsity", "missing", "--sparsity 0.5"), whole=True)


def test_a_command_without_a_model(command: Command) -> None:
    ended = command("--sparsity", "0.5")
    assert ended.code == 2
    assert_one_message(ended.err)
    assert "--model demo" in ended.err


def test_an_unknown_command(command: Command) -> None:
    ended = command("insepct")
    assert ended.code == 2
    assert_one_message(ended.err)
    assert "insepct" in ended.err


def test_a_recipe_that_is_not_there_or_has_an_unknown_key(
    command: Command, source: Path, home: Path
) -> None:
    recipe = home / "recipe.yaml"
    recipe.write_text(f"model: {source}\nsteps:\n- prune: {{sparsity: 0.5, patern: '2:4'}}\n")
    wrong_key = command("--recipe", recipe)
    assert wrong_key.code == 2
    assert_one_message(wrong_key.err)
    assert "steps[0].prune.patern" in wrong_key.err
    assert "'pattern'" in wrong_key.err
    absent = command("--recipe", home / "recipes.yaml")
    assert absent.code == 2
    assert_one_message(absent.err)
    assert "recipe.yaml" in absent.err


def test_a_text_that_fills_no_window_or_is_empty(
    source: Path, refused: Refused, tmp_path: Path
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Too short.")
    refused(source, "--calib", text, says=("10 tokens", "one window needs 16", "seq_len"))
    text.write_text(" \n")
    refused(source, "--calib", text, says=("calibration.data", "no text"))


# Checkpoints.


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], object]) -> None:
    """Change a tensor in place in its shard."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"][name]
    tensors = safetensors.torch.load_file(path)
    change(tensors[name])
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def keep_only(folder: Path, *names: str) -> None:
    """Replace the weights of a folder by empty files with these names."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    for name in names:
        (folder / name).write_bytes(b"")


def overwrite_header(folder: Path) -> None:
    shard = first_shard(folder)
    shard.write_bytes(struct.pack("<Q", 1 << 60) + shard.read_bytes()[8:])


def truncate(folder: Path) -> None:
    shard = first_shard(folder)
    shard.write_bytes(shard.read_bytes()[:-10])


def point_outside(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shutil.copy(first_shard(folder), folder.parent / "outside.safetensors")
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../outside.safetensors")
    path.write_text(json.dumps(index))


def promise_too_much(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra.weight"] = first_shard(folder).name
    path.write_text(json.dumps(index))


def adapter_only(folder: Path) -> None:
    keep_only(folder, "adapter_config.json")
    (folder / "config.json").unlink()
    (folder / "adapter_model.safetensors").write_bytes(b"")


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "empty folder": (
        lambda f: [path.unlink() for path in f.iterdir()],
        ("is empty", "config.json"),
    ),
    "no config": (lambda f: (f / "config.json").unlink(), ("has no config.json",)),
    "config that is no JSON": (
        lambda f: (f / "config.json").write_text("{"),
        ("config.json is not valid JSON",),
    ),
    "overwritten header": (overwrite_header, ("00001-of-", "not a readable safetensors", "fetch")),
    "truncated shard": (truncate, ("00001-of-", "truncated", "fetch it again")),
    "index that points outside": (
        point_outside,
        ("'../outside.safetensors'", "outside the folder"),
    ),
    "index that promises too much": (promise_too_much, ("model.extra.weight", "fetch")),
    "index without a map": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        ("has no weight_map", "fetch it again"),
    ),
    "missing shard": (lambda f: first_shard(f).unlink(), ("00001-of-", "missing", "fetch")),
    "no weights": (keep_only, ("has neither model.safetensors nor",)),
    "pickles only": (
        lambda f: keep_only(f, "pytorch_model.bin"),
        ("pytorch_model.bin", "no safetensors", "save_pretrained"),
    ),
    "adapter only": (adapter_only, ("PEFT adapter", "merge_and_unload")),
    "GGUF": (lambda f: keep_only(f, "model-Q4.gguf"), ("GGUF", "original safetensors")),
    "config of another size": (
        lambda f: edit_config(f, hidden_size=48),
        ("has shape", "config.json makes it", "different models"),
    ),
    "config of more blocks": (
        lambda f: edit_config(f, num_hidden_layers=5),
        ("model.layers.4.", "config.json asks for"),
    ),
    "quantised": (
        lambda f: edit_config(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        ("is quantised (gptq)", "16-bit checkpoint"),
    ),
    "remote code": (
        lambda f: edit_config(f, model_type="odd", auto_map={"AutoConfig": "odd.Config"}),
        ("auto_map", "--trust-remote-code"),
    ),
    "vision tower": (
        lambda f: edit_config(f, model_type="llava", vision_config={"hidden_size": 8}),
        ("llava", "vision tower", "language model"),
    ),
    "family without blocks in a row": (
        lambda f: (f / "config.json").write_text('{"model_type": "hrm_text"}'),
        ("HrmTextForCausalLM has no list of blocks", "model.H_module.layers"),
    ),
    "family with attention and FFN in lists of their own": (
        lambda f: (f / "config.json").write_text('{"model_type": "xlm"}'),
        ("more than one list", "transformer.ffns and transformer.attentions"),
    ),
    "family of other tensors": (
        lambda f: (f / "config.json").write_text('{"model_type": "gpt2"}'),
        ("holds no tensor for", "transformers would fill it"),
    ),
    "unknown model type": (
        lambda f: edit_config(f, model_type="lama"),
        ("config.json is not understood", "lama"),
    ),
    "NaN embedding": (
        lambda f: edit_tensor(f, "model.embed_tokens.weight", lambda w: w.fill_(float("nan"))),
        ("block 0", "NaN or infinity"),
    ),
    "infinite activation": (
        lambda f: edit_tensor(f, "model.layers.0.input_layernorm.weight", lambda w: w.fill_(3e38)),
        ("activation 'attn_in' of block 0", "NaN or infinity"),
    ),
    "no tokenizer": (
        lambda f: [path.unlink() for path in f.glob("tokenizer*")],
        ("no usable tokenizer", "tokenizer.json", "--method magnitude"),
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_or_unsuitable_checkpoint(name: str, own_source: Path, refused: Refused) -> None:
    damage, says = DAMAGES[name]
    damage(own_source)
    refused(own_source, says=says)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_weight_that_is_not_finite_is_named_where_no_text_is_read(
    value: str, own_source: Path, refused: Refused
) -> None:
    edit_tensor(own_source, Q_PROJ, lambda w: w[1, 2].fill_(float(value)))
    refused(own_source, "--method", "magnitude", says=(f"tensor {Q_PROJ}", "NaN or infinity"))


def test_a_weight_that_is_not_finite_is_named_where_text_is_read(
    own_source: Path, refused: Refused
) -> None:
    edit_tensor(own_source, Q_PROJ, lambda w: w[1, 2].fill_(float("nan")))
    refused(own_source, says=(Q_PROJ, "NaN or infinity"))


def test_float16_that_overflows_names_the_activation_and_a_wider_type(
    own_source: Path, refused: Refused
) -> None:
    name = "model.layers.0.input_layernorm.weight"
    edit_tensor(own_source, name, lambda w: w.fill_(6e4))
    says = ("block 0", "--dtype bfloat16 or float32")
    refused(own_source, "--dtype", "float16", says=says)


@pytest.mark.parametrize("model", ["nowhere/at/all", "./absent", "bad name"])
def test_a_model_that_is_neither_folder_nor_hub_id(model: str, refused: Refused) -> None:
    refused(model, says=(model, "no such folder", "owner/name"))


def test_a_model_that_is_a_file(source: Path, refused: Refused) -> None:
    refused(source / "config.json", says=("is a file", "folder that holds config.json"))


# Where the result goes.


def test_out_is_the_source(own_source: Path, refused: Refused) -> None:
    refused(own_source, "--out", own_source, says=("the source", "--out"))


@pytest.mark.parametrize("below", ["out", "deep/out"])
def test_out_lies_in_the_source(below: str, own_source: Path, refused: Refused) -> None:
    refused(own_source, "--out", own_source / below, says=("the source", "--out"))


def test_out_holds_the_source(own_source: Path, refused: Refused) -> None:
    refused(own_source, "--out", own_source.parent, "--overwrite", says=("the source", "--out"))


def test_out_is_not_empty(source: Path, refused: Refused, home: Path) -> None:
    (home / "out").mkdir()
    (home / "out" / "thesis.txt").write_text("mine")
    refused(source, says=("is not empty", "--overwrite"))
    assert (home / "out" / "thesis.txt").read_text() == "mine"


def test_out_is_a_file(source: Path, refused: Refused, home: Path) -> None:
    (home / "out").write_text("mine")
    refused(source, says=("is a file", "--out"))
    refused(source, "--overwrite", says=("is a file", "--out"))


def test_out_cannot_be_written(source: Path, refused: Refused) -> None:
    refused(source, "--out", "/proc/out", says=("/proc", "cannot be written", "--out"))


def test_out_lies_below_a_file(source: Path, refused: Refused, home: Path) -> None:
    (home / "file").write_text("mine")
    refused(source, "--out", home / "file" / "out", says=("cannot be written", "--out"))


def test_out_is_being_written_by_another_run(source: Path, refused: Refused, home: Path) -> None:
    with Records(out=home / "out").lock():
        refused(source, says=("another run is writing", "--out"))
    assert list(home.iterdir()) == []


def test_a_refused_run_leaves_no_new_parent_folders(
    source: Path, refused: Refused, home: Path, tmp_path: Path
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Too short.")
    refused(source, "--calib", text, "--out", home / "new" / "deep" / "out", says=("10 tokens",))


# What runs out.


def test_a_disk_that_is_too_small_is_known_before_anything_is_written(
    source: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = SimpleNamespace(total=1, used=0, free=1000)
    monkeypatch.setattr(sources.shutil, "disk_usage", lambda path: full)
    refused(source, says=("1 kB are free", "--out"))


class Resumable:
    """A command that fails in the middle, and then does not."""

    def __init__(self, command: Command, source: Path, text_file: Path, home: Path) -> None:
        self.command, self.home = command, home
        self.arguments = ["--model", source, "--sparsity", 0.5, "--calib", text_file]
        self.arguments += ["--num-samples", 4, "--seq-len", 16, "--no-eval"]
        self.arguments += ["--out", home / "out"]

    def fails(self, *says: str) -> None:
        """Run it; it is refused with these words and leaves what it finished."""
        ended = self.command(*self.arguments)
        assert ended.code == 2, ended
        assert_one_message(ended.err)
        for part in says:
            assert part in ended.err
        assert [path.name for path in self.home.iterdir()] == ["out.partial"]

    def resumes(self) -> None:
        ended = self.command(*self.arguments)
        assert ended.code == 0, ended
        assert "resumed after block 0" in ended.out
        assert [path.name for path in self.home.iterdir()] == ["out"]


@pytest.fixture
def resumable(
    command: Command, source: Path, text_file: Path, home: Path, quick_gate: None
) -> Resumable:
    return Resumable(command, source, text_file, home)


def test_a_disk_that_fills_up_in_the_middle(resumable: Resumable) -> None:
    save, calls = safetensors.torch.save_file, 0

    def fail(tensors: Any, path: str, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 3:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tensors, path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", fail)
        resumable.fails("disk is full", "run the same command again to resume")
    assert not list(resumable.home.rglob("*.tmp"))
    resumable.resumes()


def test_a_disk_so_full_that_not_even_an_event_can_be_written(
    resumable: Resumable,
) -> None:
    save, opened, calls = safetensors.torch.save_file, Path.open, 0

    def fail(tensors: Any, path: str, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise OSError(28, "No space left on device")
        save(tensors, path, **options)

    def fail_too(self: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if calls > 3 and mode != "r" and self.name == "events.jsonl":
            raise OSError(28, "No space left on device")
        return opened(self, mode, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", fail)
        patch.setattr(Path, "open", fail_too)
        resumable.fails("disk is full", "run the same command again to resume")
    resumable.resumes()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_memory_that_runs_out_inside_a_block(error: Exception, resumable: Resumable) -> None:
    cut, calls = Cutter.cut, 0

    def fail(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 10:
            raise error
        cut(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cutter, "cut", fail)
        resumable.fails("out of memory", "--num-samples", "--max-memory", "resumes")
    assert resumable.command(*resumable.arguments).code == 0


def test_a_fault_of_ours_is_no_users_error(
    resumable: Resumable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Cutter, "cut", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        cli.main([str(argument) for argument in resumable.arguments])


# The Hub.


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Let the Hub's client use another address and an empty cache."""

    def use(endpoint: str, *, offline: bool = False) -> None:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    return use


@pytest.fixture
def refusing_hub() -> Iterator[Callable[..., str]]:
    """Return the address of a server that answers everything with one status and error code.

    What ends with `after`, the question for the model's files, is answered as it should be.
    """
    servers = []

    def start(status: int, error_code: str, *, after: str | None = None) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = b'{"error": "no"}'
                answered = after is not None and self.path.partition("?")[0].endswith(after)
                if answered:
                    body = b'{"id": "a/b", "sha": "%s", "siblings": [%s, %s]}' % (
                        b"a" * 40,
                        b'{"rfilename": "config.json", "size": 10}',
                        b'{"rfilename": "model.safetensors", "size": 10}',
                    )
                self.send_response(200 if answered else status)
                self.send_header("X-Error-Code", error_code)
                self.send_header("X-Error-Message", "no")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "error_code", "says"),
    [
        (403, "GatedRepo", ("owner/name is gated", "Accept its terms", "hf auth login")),
        (401, "GatedRepo", ("owner/name is gated", "hf auth login")),
        (404, "RepoNotFound", ("owner/name is neither", "spelling", "hf auth login")),
        (401, "RepoNotFound", ("owner/name is neither", "hf auth login")),
        (404, "RevisionNotFound", ("no revision 'v2'", "--revision")),
        (503, "", ("the Hub cannot be reached", "--model demo")),
        (429, "", ("owner/name",)),
        (403, "", ("owner/name",)),
    ],
)
def test_a_hub_that_says_no(
    status: int,
    error_code: str,
    says: tuple[str, ...],
    hub: Callable[..., None],
    refusing_hub: Callable[..., str],
    refused: Refused,
) -> None:
    hub(refusing_hub(status, error_code))
    refused("owner/name", "--revision", "v2", says=says)


def test_a_hub_that_falls_silent_after_its_first_answer(
    hub: Callable[..., None], refusing_hub: Callable[..., str], refused: Refused
) -> None:
    hub(refusing_hub(400, "", after="/owner/name"))
    refused("owner/name", says=("owner/name", "Hub"))


def test_a_hub_that_cannot_be_reached(hub: Callable[..., None], refused: Refused) -> None:
    hub("http://127.0.0.1:9")
    refused("owner/name", says=("cannot be reached", "local cache", "--model demo"))


def test_a_hub_that_is_switched_off(hub: Callable[..., None], refused: Refused) -> None:
    hub("http://127.0.0.1:9", offline=True)
    refused("owner/name", says=("cannot be reached", "local cache", "--model demo"))
