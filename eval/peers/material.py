"""What all tools are given: a Llama stored in the dtype of the comparison, and the token ids.

Legend: N windows, T tokens in each.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cost"))

from models import write_llama

from llmprune.api import make_recipe
from llmprune.calibration.heldout import evaluation_text
from llmprune.calibration.mix import read_windows
from llmprune.checkpoint.locate import open_source
from llmprune.evaluation.perplexity import loss_of_model, pose

RANDOM = "random"


def material(asked: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """Write model and tokens into a folder, unless they are there; return both paths.

    `random` is a Llama of random weights with the demo's tokenizer; any other name is a model.
    """
    shape = f"random-{asked.blocks}x{asked.hidden}x{asked.ffn}"
    name = shape if asked.model == RANDOM else Path(asked.model).name
    model = folder / f"{name}-{asked.dtype}"
    if not (model / "config.json").exists():
        half = Path(f"{model}.half")
        shutil.rmtree(half, ignore_errors=True)
        write_model(asked, half)
        half.rename(model)
    tokens = folder / f"{name}-{asked.num_samples}x{asked.seq_len}.safetensors"
    write_tokens(asked, model, tokens)
    return model, tokens


def write_model(asked: argparse.Namespace, folder: Path) -> None:
    """Write the model as every tool will read it."""
    dtype = getattr(torch, asked.dtype)
    if asked.model == RANDOM:
        sizes = {"blocks": asked.blocks, "hidden": asked.hidden, "ffn": asked.ffn}
        write_llama(folder, **sizes, dtype=dtype)
        return
    source = open_source(asked.model).folder
    AutoModelForCausalLM.from_pretrained(source, dtype=dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def write_tokens(asked: argparse.Namespace, model: Path, file: Path) -> None:
    """Write `calibration` and `evaluation` (N, T) of the demo's texts, drawn as our runs do."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    wish = {"calib": "demo", "num_samples": asked.num_samples, "seq_len": asked.seq_len}
    recipe = make_recipe(str(model), sparsity=0.5, **wish)
    calibration_NT = read_windows(recipe, tokenizer, seq_len=asked.seq_len).tokens
    text = evaluation_text("demo", tokenizer=tokenizer)
    question = pose(text, tokenizer, data="demo", seq_len=asked.seq_len)
    evaluation_NT = question.windows.inputs_NT[: asked.num_windows]
    found = {"calibration": calibration_NT, "evaluation": evaluation_NT}
    save_file({name: ids.contiguous() for name, ids in found.items()}, str(file))


@torch.no_grad()
def judged(folder: Path, tokens: Path) -> dict[str, float]:
    """Return a result's perplexity in float32, and the share of zeros in linears of blocks."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    loss, count = loss_of_model(model, load_file(tokens)["evaluation"].long())
    weights = [
        module.weight
        for module in model.model.layers.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    gone = sum(int((weight == 0).sum()) for weight in weights)
    share = gone / sum(weight.numel() for weight in weights)
    return {"perplexity": round(math.exp(loss / count), 4), "zeros": round(share, 6)}
