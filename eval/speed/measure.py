"""Speed of a dense Llama of 300 M parameters beside a copy with 30 % cut, and one with 50 % zeros.

    python eval/speed/measure.py --work DIR [--threads 1] [--repeat 9] [--out results.json]
    python eval/speed/measure.py --dense A --cut B --masked C

Weights are random: speed depends on shapes alone. Of every block the cut copy lacks 672 of 2816 FFN
channels and two of four key-value groups, 30 % of the block, by slicing; the masked copy has every
other weight of its linears at zero, drawn at random. Beside the measured ratio of decoding stands
the one that `latency_table` and `trunk_latency` foretell from single blocks.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from llmprune.base.progress import Progress
from llmprune.checkpoint.sink import copy_side_files
from llmprune.checkpoint.source import INDEX, open_folder
from llmprune.evaluation.latency import latency_table, trunk_latency
from llmprune.evaluation.speed import bench

sys.path.append(str(Path(__file__).resolve().parents[1] / "cost"))
from models import write_llama

HIDDEN, FFN, BLOCKS, VOCAB, HEAD = 1024, 2816, 24, 16384, 64
CUT = {"intermediate_size": FFN - 672, "num_attention_heads": 8, "num_key_value_heads": 2}
KEPT = {
    "q_proj": (0, CUT["num_attention_heads"] * HEAD),
    "k_proj": (0, CUT["num_key_value_heads"] * HEAD),
    "v_proj": (0, CUT["num_key_value_heads"] * HEAD),
    "o_proj": (1, CUT["num_attention_heads"] * HEAD),
    "gate_proj": (0, CUT["intermediate_size"]),
    "up_proj": (0, CUT["intermediate_size"]),
    "down_proj": (1, CUT["intermediate_size"]),
}  # by linear: the axis that is cut, and what is left of it


def main() -> None:
    asked = arguments()
    if asked.threads:
        os.environ["OMP_NUM_THREADS"] = str(asked.threads)  # of the processes that are timed
        torch.set_num_threads(asked.threads)
    folders = {"dense": asked.dense, "cut": asked.cut, "masked": asked.masked}
    if asked.dense is None:
        folders = build(asked.work)
    print_shares(folders)
    found = {"foretold": foretold(folders["cut"], folders["dense"])}
    print(f"decoding foretold from single blocks: cut {found['foretold']:.2f} x")
    for name in ("cut", "masked", "dense"):  # dense beside itself shows what is noise
        result = bench(
            folders[name],
            folders["dense"],
            batch=asked.batch,
            new=asked.new,
            repeat=asked.repeat,
            dtype="float32",
            progress=Progress("rich" if sys.stdout.isatty() else "quiet"),
        )
        print(f"\n{name}\n{result}", flush=True)
        found[name] = result.to_dict()
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def build(work: Path) -> dict[str, Path]:
    """Write the three folders below `work`, those that are not there yet."""
    folders = {name: work / name for name in ("dense", "cut", "masked")}
    if not folders["dense"].exists():
        write_llama(
            folders["dense"],
            blocks=BLOCKS,
            hidden=HIDDEN,
            ffn=FFN,
            vocab=VOCAB,
            dtype=torch.float32,
        )
    for name, change in (("cut", sliced), ("masked", zeroed)):
        if not folders[name].exists():
            rewrite(folders["dense"], folders[name], change)
    config = json.loads((folders["dense"] / "config.json").read_text(encoding="utf-8"))
    changed = config | CUT | {"head_dim": HEAD}
    (folders["cut"] / "config.json").write_text(json.dumps(changed, indent=2), encoding="utf-8")
    return folders


def rewrite(source: Path, out: Path, change) -> None:
    """Copy a checkpoint with every linear of its blocks changed."""
    out.mkdir(parents=True)
    copy_side_files(source, out)
    (out / INDEX).write_bytes((source / INDEX).read_bytes())
    draw = torch.Generator().manual_seed(1)
    for path in sorted(source.glob("*.safetensors")):
        tensors = {}
        for name, value in load_file(path).items():
            linear = name.removesuffix(".weight").rpartition(".")[2]
            tensors[name] = change(linear, value, draw) if linear in KEPT else value
        save_file(tensors, out / path.name, metadata={"format": "pt"})


def sliced(linear: str, weight_OI: Tensor, draw: torch.Generator) -> Tensor:
    """Return the first rows or columns of a linear."""
    axis, left = KEPT[linear]
    return weight_OI.narrow(axis, 0, left).contiguous()


def zeroed(linear: str, weight_OI: Tensor, draw: torch.Generator) -> Tensor:
    """Return a linear with half its weights at zero."""
    return weight_OI * (torch.rand(weight_OI.shape, generator=draw) < 0.5)


def print_shares(folders: dict[str, Path]) -> None:
    """Print the parameters of each folder, and the share of them that lies in blocks."""
    sizes = {}
    for name, folder in folders.items():
        entries = open_folder(folder).entries
        sizes[name] = sum(e.num_params for key, e in entries.items() if ".layers." in key)
        total = sum(entry.num_params for entry in entries.values())
        print(f"{name}: {total:,} parameters, {sizes[name] / total:.1%} in blocks, "
              f"{1 - sizes[name] / sizes['dense']:.1%} of those of dense blocks cut")  # fmt: skip


def foretold(cut: Path, dense: Path) -> float:
    """Return how many times faster decoding should be, by the sum of its parts."""
    config, smaller = AutoConfig.from_pretrained(dense), AutoConfig.from_pretrained(cut)
    sizes = {key: getattr(smaller, key) for key in CUT}
    where = {"device": torch.device("cpu"), "dtype": torch.float32, "repeat": 25}
    trunk = trunk_latency(config, **where)
    blocks = latency_table(config, [{}, sizes], **where)
    whole, less = (trunk + config.num_hidden_layers * seconds for seconds in blocks)
    return whole / less


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("speed-models"))
    for name in ("dense", "cut", "masked"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--threads", type=int, help="[default: torch's]")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
