"""What is shown of results that were trained: the table, the picture, the card, the command."""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmprune import Report, cli, recipe
from llmprune.base.progress import Progress
from llmprune.delivery.masks import MaskFiles
from llmprune.recipe import build, recovery_recipe
from llmprune.recipe.dialect import load
from llmprune.report.publishing import pack
from llmprune.report.recounting import block_rows
from llmprune.report.recoveries import recoveries_of, sides, texts_of
from llmprune.report.reproduction import command_text, recipe_text
from llmprune.runs import run_recipe
from tests.conftest import Pico

pytestmark = pytest.mark.usefixtures("quick_gate")
TRAIN: dict[str, Any] = {"steps": 3, "batch": 2, "seq_len": 16}
CUT = {"method": "magnitude"}
Made = Callable[[str], Path]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recovered")


@pytest.fixture
def made(home: Path, pico: Pico, text_file: Path) -> Made:
    """Return the folder of a result by name, made once; never write into it."""
    train = TRAIN | {"data": str(text_file), "distill": "none"}
    evaluate = {"evaluate": {"data": str(text_file), "num_windows": 2, "perplexity": True}}
    within = {"prune": CUT | {"sparsity": 0.6}, "every": 1}
    wishes: dict[str, tuple[str | None, list[dict[str, Any]]]] = {
        "pruned": (None, [{"prune": CUT | {"sparsity": 0.5}}]),
        "recovered": ("pruned", [{"recover": train | {"rank": 2}}]),
        "again": ("recovered", [{"recover": train | {"method": "norms"}}]),
        "gradual": (None, [{"recover": train | within}]),
        "tightened": ("pruned", [{"recover": train | within}]),
        "chain": (
            None,
            [
                {"prune": CUT | {"sparsity": 0.3}},
                {"recover": train | {"rank": 2}},
                {"prune": CUT | {"sparsity": 0.6}},
                {"recover": train | {"method": "norms", "distill": "kl"}},
            ],
        ),
        "smaller": (
            None,
            [
                {"prune": {"pattern": "ffn-channels", "method": "wanda", "sparsity": 0.25}},
                {"recover": train | {"rank": 2}},
            ],
        ),
        "cut last": ("recovered", [{"prune": CUT | {"sparsity": 0.7}}]),
        "further": (None, [{"recover": train | {"method": "lora", "rank": 2}}]),
        "foreign": ("bare", [{"recover": train | {"masks": "zeros", "rank": 2}}]),
    }

    def make(name: str) -> Path:
        out = home / name
        if out.exists():
            return out
        if name == "bare":
            shutil.copytree(make("pruned"), out)
            shutil.rmtree(out / "llmprune")
            return out
        source, steps = wishes[name]
        text = {"data": str(text_file), "num_samples": 4, "seq_len": 16}
        top = {"device": "cpu", "out": str(out), "calibration": text}
        model = str(pico("llama") if source is None else make(source))
        run_recipe(build({"model": model, **top, "steps": [*steps, evaluate]}), Progress("quiet"))
        return out

    return make


def lines_of(folder: Path) -> dict[str, str]:
    """Return what the table says, by name."""
    return dict(
        re.split(r"\s{2,}", line, maxsplit=1) for line in str(Report.read(folder)).split("\n")
    )  # type: ignore[misc]


def labels_of(folder: Path) -> list[str]:
    return [side.label for side in sides(Report.read(folder).data)]


def test_the_table_says_what_training_did(made: Made) -> None:
    lines, data = lines_of(made("recovered")), Report.read(made("recovered")).data
    made_so = data["recovery"][0]
    (_, before), *_, (_, after) = made_so["history"]["held"]
    assert lines["recovery"].startswith("mask-lora, rank 2, norms too, 3 steps, 96 tokens; ")
    assert f"held-out loss {before:.4f} before, {after:.4f} after" in lines["recovery"]
    assert f"stored within {made_so['merge']['stored']:.1e} of" in lines["recovery"]
    values = [data["perplexity"][key]["value"] for key in ("dense", "before", "pruned")]
    words = zip(values, ("dense", "pruned", "recovered"), strict=True)
    assert lines["perplexity"].startswith(", ".join(f"{v:.3f} {word}" for v, word in words))
    assert lines["memory"].endswith("at the end")


def test_two_trainings_of_a_chain_have_a_line_each(made: Made) -> None:
    lines = lines_of(made("chain"))
    assert "recovery" not in lines
    assert (
        lines["recovery 1"].startswith("mask-lora, rank 2") and "taught" not in lines["recovery 1"]
    )
    assert lines["recovery 2"].startswith(
        "norms, 3 steps, 96 tokens; taught by the dense model (kl)"
    )


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("pruned", ["dense", "pruned"]),
        ("recovered", ["dense", "pruned", "recovered"]),
        ("again", ["dense", "before", "recovered"]),
        ("chain", ["dense", "pruned", "recovered"]),
        ("gradual", ["dense", "pruned"]),
        ("tightened", ["dense", "before", "pruned"]),
        ("cut last", ["dense", "pruned"]),
        ("further", ["dense", "trained"]),
        ("foreign", ["pruned", "recovered"]),
    ],
)
def test_every_side_of_a_comparison_has_its_name(name: str, labels: list[str], made: Made) -> None:
    assert labels_of(made(name)) == labels
    report = Report.read(made(name))
    quality = report.data["perplexity"]
    expected = None
    if "dense" in labels:
        dense = quality["dense"] if "dense" in quality else quality["before"]
        expected = (dense["value"], quality["pruned"]["value"])
    assert report.perplexity == expected


def test_tokens_of_another_vocabulary_are_not_asked_of_the_dense_model(made: Made) -> None:
    data = dict(Report.read(made("recovered")).data) | {"pattern": "vocabulary"}
    assert [side.label for side in sides(data)] == ["pruned", "recovered"]


def test_what_is_asked_for_is_known_of_the_own_steps_alone(made: Made) -> None:
    found = recoveries_of(Report.read(made("again")).data)
    assert [one.wish.get("method") for one in found] == [None, "norms"]
    found = recoveries_of(Report.read(made("chain")).data)
    assert [one.wish["method"] for one in found] == ["auto", "norms"]
    assert [one.wish for one in recoveries_of(Report.read(made("cut last")).data)] == [{}]


@pytest.mark.parametrize("name", ["gradual", "tightened"])
def test_masks_that_moved_are_counted_anew(name: str, made: Made) -> None:
    report = Report.read(made(name))
    assert report.data["blocks"] == block_rows(made(name))
    masks = MaskFiles(made(name)).of_block("")
    rows = {row["site"]: row for block in report.data["blocks"] for row in block["sites"]}
    assert rows.keys() == masks.keys()
    for site, keep_OI in masks.items():
        assert rows[site]["removed_weights"] == int((~keep_OI).sum())
        assert rows[site]["weights"] == keep_OI.numel()
    for block in report.data["blocks"]:
        assert block["sparsity"] == pytest.approx(0.6, abs=0.01)
    assert len(report.table().splitlines()) == len(masks) + 1


def test_the_picture_has_a_panel_of_losses_for_every_training(made: Made) -> None:
    figure = Report.read(made("chain")).plot()
    panels = [axes for axes in figure.axes if axes.get_ylabel().startswith("loss")]
    records = Report.read(made("chain")).data["recovery"]
    assert [axes.get_xlabel() for axes in panels] == [
        "step of recovery 1 (mask-lora)",
        "step of recovery 2 (norms)",
    ]
    beside = [axes for axes in figure.axes if "teacher" in axes.get_ylabel()]
    assert len(beside) == 1  # of the second alone
    for own, training, record in zip(panels, [panels[0], *beside], records, strict=True):
        drawn = {line.get_label(): line.get_xydata().tolist() for line in own.get_lines()}
        drawn |= {line.get_label(): line.get_xydata().tolist() for line in training.get_lines()}
        history = record["history"]
        assert drawn == {"training": history["training"], "held out": history["held"]}
    assert figure.get_suptitle().startswith("llama-tied-single (llama), magnitude, sparsity 0.6")


@pytest.mark.parametrize(("name", "panels"), [("gradual", 2), ("further", 1), ("foreign", 1)])
def test_panels_of_what_is_not_known_are_left_out(name: str, panels: int, made: Made) -> None:
    figure = Report.read(made(name)).plot()
    assert len([axes for axes in figure.axes if axes.get_xlabel()]) == panels
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert "loss held out" in Report.read(made(name))._repr_html_()


def card_of(folder: Path, **wishes: Any) -> str:
    return pack(folder, "me/small", **wishes).card


def bash_of(card: str) -> list[str]:
    """Return the lines of the block of commands."""
    (block,) = re.findall(r"```bash\n(.*?)```", card, re.DOTALL)
    return str(block).strip().splitlines()


def test_a_card_tells_how_a_pruned_folder_was_trained(made: Made) -> None:
    card = card_of(made("recovered"))
    for words in (
        "Then it was trained: Masked LoRA (Zimmer et al., PERP",
        "What had been removed stayed zero.",
        "- Masked LoRA of rank 2 (Zimmer et al., PERP",
        "| measured | how | dense | pruned | recovered |",
        "do not say how much of the gain is recovery",
        "Trained on 7 windows of 16 tokens of `text.txt`",
        "- recovered\n- mask-lora\n",
    ):  # fmt: skip
        assert words in card, words
    assert "was not trained after pruning" not in card and "pruned before" not in card
    cut, train = bash_of(card)
    assert cut.startswith("llmprune --model llama-tied-single --method magnitude --sparsity 0.5")
    assert cut.endswith("--out pruned")
    assert train.startswith("llmprune recover pruned --data text.txt --steps 3 --batch 2")
    assert "`llama-tied-single` stands for the folder that the base model was read from" in card


def test_a_base_model_that_is_named_stands_in_the_first_command(made: Made) -> None:
    cut, train = bash_of(card_of(made("recovered"), base_model="owner/base"))
    assert "--model owner/base " in cut and "recover pruned " in train


def test_all_that_came_before_is_told_as_far_as_it_is_there(made: Made, tmp_path: Path) -> None:
    assert [line.split()[1] for line in bash_of(card_of(made("again")))] == [
        "--model",
        "recover",
        "recover",
    ]
    lost = tmp_path / "lost"
    shutil.copytree(made("recovered"), lost)
    path = lost / "llmprune" / "run.json"
    run = json.loads(path.read_text(encoding="utf-8"))
    run["source"]["fingerprint"] = "another"
    path.write_text(json.dumps(run), encoding="utf-8")
    card = card_of(lost)
    assert len(bash_of(card)) == 1
    assert "`pruned` stands for the pruned model that was trained (`magnitude`, pattern" in card


def test_a_chain_is_told_as_a_recipe(made: Made) -> None:
    card = card_of(made("chain"))
    (text,) = re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)
    run = json.loads((made("chain") / "llmprune" / "run.json").read_text(encoding="utf-8"))
    steps = build(load(text)).steps
    asked = build({"model": "x", "steps": run["chain"]["steps"]}).steps
    assert [step.prune for step in steps] == [step.prune for step in asked]
    assert [getattr(s.recover, "method", None) for s in steps] == [
        None,
        "auto",
        None,
        "norms",
        None,
    ]
    assert bash_of(card) == ["llmprune --recipe recipe.yaml"]
    assert "Between its cuts and after them it was trained: Masked LoRA" in card
    assert ", then Norms, 192 tokens in all" in card


def test_a_card_tells_of_cuts_while_training(made: Made) -> None:
    card = card_of(made("gradual"))
    assert "pruned while it was trained, with llmprune" in card
    assert "The training: All kept weights (Kurtic et al." in card
    assert "pruned to 0.6 meanwhile by magnitude, schedule cubic (Zhu and Gupta" in card
    assert re.search(r"\| `self_attn.q_proj` \| 0-1 \| [\d,]+ \| [\d,]+ \| 0\.\d{4} \|", card)
    assert "had been pruned before" not in card
    assert "had been pruned before; the numbers are of both" in card_of(made("tightened"))
    (line,) = bash_of(card)
    assert '--set \'recover.prune={"method": "magnitude", "sparsity": 0.6}\'' in line


def test_soft_masks_are_by_magnitude_whatever_is_asked_for(made: Made) -> None:
    data = copy.deepcopy(dict(Report.read(made("gradual")).data))
    data["method"] = data["run"]["recipe"]["steps"][0]["recover"]["prune"]["method"] = "wanda"
    data["run"]["recipe"]["steps"][0]["recover"]["soft"] = "pdp"
    text = str(Report(data))
    assert "meanwhile by magnitude, schedule cubic; soft mask pdp" in text and "wanda" not in text


def test_what_llmprune_did_not_prune_is_not_said_to_be(made: Made) -> None:
    dense, foreign = card_of(made("further")), card_of(made("foreign"))
    for card in (dense, foreign):
        assert "## Masks" not in card and "## What was removed" not in card
        assert "\n- pruned\n" not in card
    assert "trained with llmprune" in dense and "the size and the speed of the base model" in dense
    assert "pruned by another tool; what was zero stayed zero" in foreign
    assert "its zeros held" in str(Report.read(made("foreign")))
    assert "sparsity" not in lines_of(made("further"))


def test_a_smaller_model_says_what_stayed_out(made: Made) -> None:
    card = card_of(made("smaller"))
    assert "What had been removed stayed out." in card and "Then it was trained: LoRA (" in card


def test_a_cut_after_training_is_the_last_word(made: Made) -> None:
    card = card_of(made("cut last"))
    assert "Before its last cut it was trained: Masked LoRA" in card
    assert "no mask touches are the base model's" in card
    assert [line.split()[1] for line in bash_of(card)] == ["--model", "recover", "--model"]


WISHES: list[dict[str, Any]] = [
    {"steps": [{"recover": {}}, {"evaluate": {}}]},
    {
        "steps": [{"recover": {"steps": 9, "data": "a text.txt", "rank": 4, "norms": False}},
                  {"evaluate": {"num_windows": 4}}],
        "seed": 3, "device": "cpu", "attention": "eager", "trust_remote_code": True,
        "revision": "main", "dtype": "float32", "calibration": {"data": "demo"},
    },
    {"steps": [{"recover": {"data": [{"data": "c4", "weight": 3}, {"data": "a.txt"}]}},
               {"evaluate": {"perplexity": False}}]},
    {"steps": [{"recover": {"prune": {"pattern": "2:4"}, "schedule": "staircase",
                            "window": [0.0, 0.5], "options": {"rounds": 2}}}, {"evaluate": {}}]},
    {"steps": [{"recover": {"prune": {"effort": "best", "sparsity": 0.7, "method": "wanda"},
                            "learning_rate": 3e-5, "masks": "zeros"}}, {"evaluate": {}}]},
]  # fmt: skip


@pytest.mark.parametrize("wish", WISHES)
def test_a_command_asks_for_the_same_recovery(
    wish: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = build({"model": "owner/name", **copy.deepcopy(wish)})
    found: list[Any] = []

    def stop(*given: Any) -> Any:
        found.append(recovery_recipe(*given))
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "recovery_recipe", stop)
    words = shlex.split(command_text(asked.to_dict()))
    assert words[:3] == ["llmprune", "recover", "owner/name"]
    with pytest.raises(SystemExit):
        cli.main(words[1:])
    assert found == [asked]


@pytest.mark.parametrize("wish", WISHES)
def test_a_recipe_in_yaml_is_the_same_recipe(wish: dict[str, Any]) -> None:
    asked = build({"model": "owner/name", **wish})
    assert build(load(recipe_text(asked.to_dict()))) == asked


def test_paths_of_all_runs_are_cut_down(made: Made, home: Path) -> None:
    for name in ("again", "chain", "tightened"):
        package = pack(made(name), "me/small")
        for name, content in package.texts.items():
            text = content.decode(errors="replace")
            assert str(home) not in text and "/pytest-" not in text, name


def test_texts_of_all_that_was_learnt_from_are_told(made: Made) -> None:
    data = Report.read(made("smaller")).data
    assert [read.use for read in texts_of(data)] == ["calibration", "training"]
    calibration, training = (read.record for read in texts_of(data))
    assert training["tokens"] == data["run"]["tokens"] != calibration["tokens"]
    card = card_of(made("smaller"))
    assert card.count("Calibrated on 4 windows of 16 tokens") == 1
    assert card.count("Trained on") == 1
