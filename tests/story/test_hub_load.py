"""`llmprune.load("owner/name")`: masked, packed, and with blocks that differ, as from a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest
import torch

from llmprune import api
from llmprune.delivery.packed_model import pack_model
from tests.story.test_hub import Hub

REVISIONS = ("main", "v2", "c" * 40)
SCRIPT = """
import json, os, sys, urllib.request
import torch, llmprune
ids = torch.arange(1, 17)[None]
found = []
for number, revision in enumerate(json.loads(sys.argv[1])):
    urllib.request.urlopen(f"{os.environ['HF_ENDPOINT']}/command/{number}")
    model = llmprune.load("owner/name", revision=revision, dtype="float32", device="cpu")
    with torch.no_grad():
        found.append(model(input_ids=ids).logits.double().sum((0, 1)).tolist())
print("\\n" + json.dumps(found))
"""


class Several(Hub):
    """A repository whose files are another result in every turn."""

    def __init__(self, folders: list[Path]) -> None:
        self.turns = [
            {
                path.relative_to(folder).as_posix(): path.read_bytes()
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            }
            for folder in folders
        ]
        super().__init__({})

    @property
    def files(self) -> dict[str, bytes]:
        return self.turns[max(0, self.command)]

    @files.setter
    def files(self, files: dict[str, bytes]) -> None:
        """Leave what there is; the constructor sets none."""


@pytest.mark.usefixtures("quick_gate")
def test_results_of_every_kind_load_by_name(
    pico: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    common = {"calib": str(text_file), "num_samples": 4, "seq_len": 16, "quiet": True}
    still = ["evaluate.perplexity=false"]
    folders = [tmp_path / name for name in ("masked", "packed", "unlike")]
    api.prune(str(pico("llama")), sparsity=0.5, out=folders[0], settings=still, **common)
    pack_model(folders[0], folders[1])
    api.prune(
        str(pico("llama")), method="flap", sparsity=0.3, out=folders[2],
        settings=[*still, "prune.multiple=1"], **common,
    )  # fmt: skip
    assert api.Report.read(folders[2]).data["tier"] in ("E2", "E3")
    server = Several(folders)
    Thread(target=server.serve_forever, daemon=True).start()
    started = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, json.dumps(REVISIONS)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ
        | {
            "HF_ENDPOINT": server.address,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.getcwd(),
        },
    )
    said, wrong = started.communicate(timeout=120)
    server.shutdown()
    server.server_close()
    assert started.returncode == 0, wrong
    ids = torch.arange(1, 17)[None]
    for folder, found in zip(folders, json.loads(said.splitlines()[-1]), strict=True):
        model = api.load(folder, dtype="float32", device="cpu")
        with torch.no_grad():
            own = model(input_ids=ids).logits.double().sum((0, 1))
        assert torch.allclose(own, torch.tensor(found, dtype=torch.float64), atol=1e-4), folder
