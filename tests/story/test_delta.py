"""`llmprune delta`: from two checkpoints to a sparse difference, and back to every bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmprune.api import gate, prune
from llmprune.checkpoint.source import open_folder
from llmprune.delivery.masks import MaskFiles
from llmprune.recovery import differences
from llmprune.recovery.differences import LIST
from tests.story.conftest import Ended

Command = Callable[..., Ended]
SINGLE = "model.safetensors"


def all_tensors(folder: Path) -> dict[str, Tensor]:
    source = open_folder(folder)
    return source.get(source.entries)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """Write a folder's tensors again, as one file."""
    tensors = change(all_tensors(folder))
    for path in folder.glob("model*"):
        path.unlink()
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move every tensor but the embeddings a little; zeros stay where they are."""
    found = {}
    for place, (name, value) in enumerate(sorted(tensors.items())):
        generator = torch.Generator().manual_seed(place)
        step = 0.02 * torch.randn(value.shape, generator=generator) * (value != 0)
        whole = "embed" in name or "wte" in name or not value.is_floating_point()
        found[name] = value if whole else (value.float() + step).to(value.dtype)
    return found


def tuned_copy(base: Path, folder: Path) -> Path:
    return rewrite(Path(shutil.copytree(base, folder)), moved)


def check_same(ours: Path, theirs: Path) -> None:
    found, wanted = all_tensors(ours), all_tensors(theirs)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        assert found[name].numpy(force=True).tobytes() == value.numpy(force=True).tobytes(), name


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("delta")


@pytest.fixture(scope="module")
def base(pico: Callable[..., Path]) -> Path:
    return pico("llama")


@pytest.fixture(scope="module")
def tuned(base: Path, home: Path) -> Path:
    return tuned_copy(base, home / "tuned")


@pytest.fixture
def small(base: Path, tuned: Path, command: Command, tmp_path: Path) -> Path:
    """A delta of its own, to be damaged."""
    assert command("delta", tuned, "--base", base, "--out", tmp_path / "d", "--no-prove").code == 0
    return tmp_path / "d"


def test_where_nothing_is_dropped_every_bit_comes_back(
    model_type: str, pico: Callable[..., Path], command: Command, tmp_path: Path, quick_gate: None
) -> None:
    base, out = pico(model_type), tmp_path / "d"
    tuned = tuned_copy(base, tmp_path / "tuned")
    made = command("delta", tuned, "--base", base, "--sparsity", 0, "--out", out, "--json")
    assert made.code == 0, made.err
    told = json.loads(made.out)
    assert told["logit_change"] == 0 and told["kept"] == told["changed"] > 0
    assert command("delta", out, "--rebuild", tmp_path / "back").code == 0
    check_same(tmp_path / "back", tuned)
    assert (tmp_path / "back" / "tokenizer.json").exists()
    assert not (tmp_path / "back" / LIST).exists()


def test_dare_drops_of_attention_and_ffn_and_keeps_the_rest(
    base: Path, tuned: Path, command: Command, tmp_path: Path, quick_gate: None
) -> None:
    out = tmp_path / "d"
    made = command("delta", tuned, "--base", base, "--sparsity", 0.75, "--out", out, "--json")
    told = json.loads(made.out)
    assert told["kept"] == pytest.approx(told["changed"] / 4, rel=1e-3)
    assert told["delta_bytes"] < told["model_bytes"] * 0.45
    assert told["num_same"] == 1 and told["logit_change"] > 0
    ended = command("delta", out, "--rebuild", tmp_path / "back")
    assert ended.code == 0 and "loads in a fresh process" in ended.out
    before, after, back = (all_tensors(f) for f in (base, tuned, tmp_path / "back"))
    for name, value in back.items():
        differs = value != before[name]
        if name.endswith("_proj.weight"):
            num = value.numel()
            assert int(differs.sum()) == num - int(0.75 * num + 0.5)
            wanted = before[name] + (after[name] - before[name]) * 4
            assert torch.equal(value[differs], wanted[differs])
        else:
            assert torch.equal(value, after[name])
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_same_seed_gives_the_same_bytes(
    base: Path, tuned: Path, command: Command, tmp_path: Path
) -> None:
    files = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        flags = ("--base", base, "--out", tmp_path / name, "--seed", seed, "--no-prove")
        assert command("delta", tuned, *flags).code == 0
        files.append((tmp_path / name / "delta-00001.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize("q", ["auto", "analytic", "0.5"])
def test_q_is_found_or_given(
    q: str, base: Path, tuned: Path, command: Command, tmp_path: Path, text_file: Path
) -> None:
    flags = ("--method", "darex-q", "--q", q, "--calib", text_file, "--out", tmp_path / "d")
    ended = command("delta", tuned, "--base", base, *flags)
    assert ended.code == 0, ended.err
    assert "was divided by q = " in ended.out and "logits change by at most" in ended.out
    found = json.loads((tmp_path / "d" / LIST).read_text())["rescaling"]
    assert (found["eta"] is not None) == (q == "analytic")
    assert (found["q"] == 0.5) == (q == "0.5")


def test_the_largest_stay_as_they_are(
    base: Path, tuned: Path, command: Command, tmp_path: Path
) -> None:
    flags = ("--method", "magnitude", "--sparsity", 0.5, "--out", tmp_path / "d", "--no-prove")
    assert command("delta", tuned, "--base", base, *flags).code == 0
    delta = differences.open_delta(tmp_path / "d")
    name = "model.layers.0.mlp.up_proj.weight"
    value = delta.rebuilt(name, open_folder(base))
    before, after = all_tensors(base)[name], all_tensors(tuned)[name]
    stays = value == after
    assert bool((value[~stays] == before[~stays]).all())
    size = (after - before).abs()
    assert float(size[stays].min()) >= float(size[~stays].max())


def masked(base: Path, folder: Path) -> Path:
    prune(str(base), sparsity=0.5, method="magnitude", out=folder, quiet=True, device="cpu",
          overwrite=True)  # fmt: skip
    return folder


@pytest.mark.parametrize("over", ["masked", "dense"])
def test_a_recovered_model_keeps_its_mask(
    over: str, base: Path, command: Command, tmp_path: Path, quick_gate: None
) -> None:
    """Over the pruned base its masks are the base's; over the dense one they go along."""
    pruned = masked(base, tmp_path / "pruned")
    tuned = Path(shutil.copytree(pruned, tmp_path / "recovered"))
    rewrite(tuned, lambda t: t | {k: v for k, v in moved(t).items() if "_proj" in k})
    below = pruned if over == "masked" else base
    out, back = tmp_path / "d", tmp_path / "back"
    assert command("delta", tuned, "--base", below, "--out", out).code == 0
    assert command("delta", out, "--rebuild", back).code == 0
    verdict = gate(back)
    assert verdict.masked_linears == len(MaskFiles(tuned).index) > 0
    for name, value in all_tensors(tuned).items():
        if name.endswith("_proj.weight"):
            assert bool((all_tensors(back)[name][value == 0] == 0).all())
            assert not torch.equal(all_tensors(back)[name], value)
    stored = list(out.glob("llmprune/masks-*.safetensors"))
    assert bool(stored) == (over == "dense")
    zeros = [k for k in load_file(out / "delta-00001.safetensors") if k.endswith(".zeros")]
    assert bool(zeros) == (over == "dense")


def test_what_is_the_base_costs_nothing(base: Path, command: Command, tmp_path: Path) -> None:
    ended = command("delta", base, "--base", base, "--out", tmp_path / "d", "--json")
    told = json.loads(ended.out)
    assert told["delta_bytes"] == told["num_pruned"] == told["num_whole"] == told["changed"] == 0


def test_files_are_small_whatever_the_checkpoint(
    base: Path,
    tuned: Path,
    command: Command,
    tmp_path: Path,
    quick_gate: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(differences, "SHARD", 30_000)
    flags = ("--base", base, "--sparsity", 0, "--out", tmp_path / "d")
    assert command("delta", tuned, *flags).code == 0
    assert command("delta", tmp_path / "d", "--rebuild", tmp_path / "back").code == 0
    assert len(list((tmp_path / "d").glob("delta-*"))) > 2
    shards = list((tmp_path / "back").glob("model-*"))
    assert len(shards) > 2 and max(path.stat().st_size for path in shards) < 40_000
    check_same(tmp_path / "back", tuned)


def test_dtypes_may_differ(base: Path, tuned: Path, command: Command, tmp_path: Path) -> None:
    half = rewrite(
        Path(shutil.copytree(tuned, tmp_path / "half")),
        lambda tensors: {name: value.bfloat16() for name, value in tensors.items()},
    )
    ended = command("delta", half, "--base", base, "--out", tmp_path / "d", "--sparsity", 0)
    assert ended.code == 0, ended.err
    delta, source = differences.open_delta(tmp_path / "d"), open_folder(base)
    for name, value in all_tensors(half).items():
        assert torch.equal(delta.rebuilt(name, source), value)


def test_the_dry_run_writes_nothing(
    base: Path, tuned: Path, command: Command, tmp_path: Path
) -> None:
    out = tmp_path / "d"
    ended = command("delta", tuned, "--base", base, "--dry-run", "--out", out)
    assert ended.code == 0 and "14 tensors of attention and FFN" in ended.out
    told = json.loads(command("delta", tuned, "--base", base, "--dry-run", "--json").out)
    command("delta", tuned, "--base", base, "--out", out, "--no-prove")
    size = (out / "delta-00001.safetensors").stat().st_size
    assert 0 < size < told["most_bytes"] + 8192  # and the header
    assert told["pruned_tensors"] == 14


def test_only_its_own_kind_is_replaced(
    base: Path, tuned: Path, small: Path, command: Command, tmp_path: Path, quick_gate: None
) -> None:
    again = ("delta", tuned, "--base", base, "--no-prove", "--sparsity", 0.5, "--out")
    assert "is not empty" in command(*again, small).err
    assert command(*again, small, "--overwrite").code == 0
    assert json.loads((small / LIST).read_text())["sparsity"] == 0.5
    back = tmp_path / "back"
    assert command("delta", small, "--rebuild", back).code == 0
    assert command("delta", small, "--rebuild", back).code == 2
    assert command("delta", small, "--rebuild", back, "--overwrite").code == 0
    assert "is not a delta" in command(*again, back, "--overwrite").err
    other = "is not a rebuilt checkpoint"
    assert "is (or contains, or lies in)" in command("delta", small, "--rebuild", small).err
    assert command("delta", tuned, "--base", base, "--no-prove", "--out", tmp_path / "e").code == 0
    assert other in command("delta", small, "--rebuild", tmp_path / "e", "--overwrite").err


def test_what_the_model_does_not_read_is_left_out(
    base: Path, tuned: Path, command: Command, tmp_path: Path, quick_gate: None
) -> None:
    """Old checkpoints hold buffers that no parameter takes, and the base may lack them."""
    other = Path(shutil.copytree(tuned, tmp_path / "other"))
    rewrite(other, lambda tensors: tensors | {"model.layers.0.extra": torch.ones(2)})
    flags = ("--base", base, "--sparsity", 0, "--out", tmp_path / "d")
    ended = command("delta", other, *flags)
    assert ended.code == 0 and "left out, for the model" in ended.out
    assert "model.layers.0.extra" in ended.out
    assert command("delta", tmp_path / "d", "--rebuild", tmp_path / "back").code == 0
    check_same(tmp_path / "back", tuned)


# A delta and its base


def test_a_base_that_has_moved_is_named(
    base: Path, tuned: Path, command: Command, tmp_path: Path, quick_gate: None
) -> None:
    first = Path(shutil.copytree(base, tmp_path / "first"))
    out, back = tmp_path / "d", tmp_path / "back"
    assert command("delta", tuned, "--base", first, "--out", out, "--sparsity", 0).code == 0
    first.rename(tmp_path / "second")
    gone = command("delta", out, "--rebuild", back)
    assert gone.code == 2 and "is gone" in gone.err and "--base" in gone.err
    assert command("delta", out, "--rebuild", back, "--base", tmp_path / "second").code == 0
    check_same(back, tuned)


def test_another_base_is_refused(
    tuned: Path, small: Path, command: Command, tmp_path: Path
) -> None:
    ended = command("delta", small, "--rebuild", tmp_path / "back", "--base", tuned)
    assert ended.code == 2 and "is not the model that" in ended.err
    assert not (tmp_path / "back").exists()


def edit_middle(folder: Path) -> None:
    """Change one weight where the fingerprint does not look."""

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        name = "model.layers.1.mlp.down_proj.weight"
        flat = tensors[name].clone()
        flat.view(-1)[flat.numel() // 3] += 1
        return tensors | {name: flat}

    rewrite(folder, change)


def test_a_base_edited_between_the_pages_is_found_out(
    base: Path, tuned: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(differences, "PAGE", 8)
    own = Path(shutil.copytree(base, tmp_path / "base"))
    out = tmp_path / "d"
    assert command("delta", tuned, "--base", own, "--out", out, "--sparsity", 0.99).code == 0
    edit_middle(own)
    ended = command("delta", out, "--rebuild", tmp_path / "back")
    assert ended.code == 2 and "down_proj" in ended.err and "do not give the tensor" in ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "d"]


def relist(delta: Path, **keys: Any) -> None:
    path = delta / LIST
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda d: (d / "delta-00001.safetensors").unlink(), "is missing"),
        (lambda d: (d / "delta-00001.safetensors").write_bytes(b"x" * 99), "truncated or damaged"),
        (lambda d: (d / LIST).unlink(), "is no delta"),
        (lambda d: (d / LIST).write_text('{"format": 9}'), "of format 9"),
        (lambda d: (d / LIST).write_text('{"format": 1, "tensors": {}}'), "malformed (KeyError"),
        (lambda d: relist(d, masks={"../../../masks-1.safetensors": "0"}), "outside the folder"),
        (lambda d: relist(d, masks={"masks-1.safetensors": "0"}), "is neither in"),
        (lambda d: (d / "notes.txt").symlink_to("/etc/hostname"), "is a link that leads out"),
    ],
)
def test_damage_is_told(
    damage: Callable[[Path], Any], says: str, small: Path, command: Command, tmp_path: Path
) -> None:
    damage(small)
    ended = command("delta", small, "--rebuild", tmp_path / "back")
    assert ended.code == 2 and says in ended.err
    assert not (tmp_path / "back").exists()


def test_another_value_in_the_delta_is_found_out(
    small: Path, command: Command, tmp_path: Path
) -> None:
    path = small / "delta-00001.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(".kept"))
    save_file(tensors | {name: tensors[name] + 1}, path)
    ended = command("delta", small, "--rebuild", tmp_path / "back")
    assert ended.code == 2 and name.removesuffix(".kept") in ended.err


# Wrong input


def set_config(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def without_norm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if name != "model.norm.weight"}


def wider(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    name = "model.layers.0.mlp.up_proj.weight"
    return tensors | {name: torch.cat([tensors[name]] * 2)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: set_config(f, model_type="qwen3"), "another family (model_type qwen3)"),
        (lambda f: set_config(f, vocab_size=65), "another vocabulary (vocab_size 65)"),
        (lambda f: rewrite(f, without_norm), "lacks 1 tensors"),
        (lambda f: rewrite(f, wider), "has shape"),
    ],
)
def test_a_base_that_does_not_fit_is_told(
    change: Callable[[Path], Any],
    says: str,
    base: Path,
    tuned: Path,
    command: Command,
    tmp_path: Path,
) -> None:
    other = Path(shutil.copytree(base, tmp_path / "other"))
    change(other)
    ended = command("delta", tuned, "--base", other, "--out", tmp_path / "d")
    assert ended.code == 2 and says in ended.err and "--base" in ended.err
    assert not (tmp_path / "d").exists()


def test_a_quantised_model_is_refused(
    base: Path, tuned: Path, command: Command, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(tuned, tmp_path / "other"))
    set_config(other, quantization_config={"quant_method": "awq"})
    for flags in ((other, "--base", base), (tuned, "--base", other)):
        ended = command("delta", *flags, "--out", tmp_path / "d")
        assert ended.code == 2 and "quantised (awq)" in ended.err


def test_numbers_that_are_none_are_told(
    base: Path, tuned: Path, command: Command, tmp_path: Path
) -> None:
    def broken(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name][0, 0] = float("nan")
        return tensors

    other = rewrite(Path(shutil.copytree(tuned, tmp_path / "other")), broken)
    ended = command("delta", other, "--base", base, "--out", tmp_path / "d")
    assert ended.code == 2 and "layers.1.mlp.up_proj" in ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "base: missing"),
        (["--base", "BASE", "--sparsity", 1], "sparsity: 1 "),
        (["--base", "BASE", "--sparsity", -0.5], "sparsity: -0.5 "),
        (["--base", "BASE", "--method", "dair"], "Did you mean 'dare'"),
        (["--base", "BASE", "--q", 0.5], "dare has no q"),
        (["--base", "BASE", "--method", "darex-q", "--q", "much"], "'much' is no number"),
        (["--base", "BASE", "--method", "darex-q", "--q", 0.01], "q: 0.01 is out of range"),
        (["--base", "no/such/place/anywhere"], "no/such/place/anywhere"),
        (["--rebuild", "x", "--sparsity", 0.5], "--sparsity is of making a delta"),
        (["--rebuild", "x"], "is no delta"),
    ],
)
def test_wrong_flags_are_the_users_fault(
    flags: list[Any], says: str, base: Path, tuned: Path, command: Command, tmp_path: Path
) -> None:
    given = [base if flag == "BASE" else flag for flag in flags]
    if "--rebuild" not in given:
        given += ["--out", tmp_path / "d"]
    ended = command("delta", tuned, *given)
    assert ended.code == 2 and says in ended.err and "Traceback" not in ended.err
    assert not (tmp_path / "d").exists()
