"""A model whose code lies in its folder: asked for before it runs, pruned, and loaded again."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from llmprune import api
from llmprune.base.errors import UnsupportedModel
from llmprune.delivery.masks import MaskFiles

CONFIGURATION = """
from transformers import PretrainedConfig

class OwnConfig(PretrainedConfig):
    model_type = "own"

    def __init__(self, vocab_size=64, hidden_size=32, inner=48, num_hidden_layers=3, **others):
        self.vocab_size, self.hidden_size, self.inner = vocab_size, hidden_size, inner
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**others)
"""

MODELING = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_own import OwnConfig
from .parts_own import doubled

class Mixer(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.gate_proj = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)

    def forward(self, x):
        past = self.value(x).cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        return past * self.gate_proj(x).sigmoid()

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.mixer = Mixer(config)
        self.wide = nn.Linear(config.hidden_size, config.inner, bias=False)
        self.narrow = nn.Linear(config.inner, config.hidden_size, bias=False)

    def forward(self, x):
        x = x + self.mixer(self.norm(x))
        return x + torch.cat([self.narrow(self.wide(part).relu()) for part in x.split(7, 1)], 1)

class OwnForCausalLM(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.stack = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.out

    def forward(self, input_ids=None, inputs_embeds=None, **others):
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        for block in self.stack:
            x = block(x)
        return CausalLMOutputWithPast(logits=self.out(doubled(x)))
"""

PARTS = "def doubled(x):\n    return 2 * x\n"

pytestmark = pytest.mark.usefixtures("quick_gate")


@pytest.fixture
def own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A model with its code, which transformers copies to a cache of this test's own."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    others = [path for path in sys.path if (Path(path) / "transformers_modules").is_dir()]
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in others])
    _forget()
    folder = tmp_path / "own-model"
    folder.mkdir()
    for name, text in {
        "configuration_own.py": CONFIGURATION, "modeling_own.py": MODELING, "parts_own.py": PARTS
    }.items():  # fmt: skip
        (folder / name).write_text(text)
    maps = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    content = {"model_type": "own", "auto_map": maps, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(content))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    tensors = {name: 5 * value for name, value in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    yield folder
    _forget()


def _forget() -> None:
    """Let Python find the code anew: modules of another cache are of another folder."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]


def test_it_is_pruned_and_loads_with_its_code(
    own_model: Path, tmp_path: Path, tokens: Tensor
) -> None:
    out = tmp_path / "out"
    report = api.prune(
        own_model, sparsity=0.5, calib=tokens, out=out, device="cpu", quiet=True,
        trust_remote_code=True, settings=["evaluate.perplexity=false"],
    )  # fmt: skip
    assert report.sparsity == 0.5 and report.data["gate"]["agreement"]["passed"]
    rows = [row for block in report.data["blocks"] for row in block["sites"]]
    assert {row["tokens"] for row in rows} == {tokens.numel()}
    names = {row["site"].removeprefix("stack.0.") for row in rows[:4]}
    assert names == {"mixer.gate_proj", "mixer.value", "wide", "narrow"}
    for file in own_model.glob("*.py"):
        assert (out / file.name).read_bytes() == file.read_bytes()
    model = api.load(out, device="cpu", trust_remote_code=True)
    for name, keep_OI in MaskFiles(out).of_block("").items():
        assert not bool(model.get_submodule(name).weight[~keep_OI].any())


def test_a_block_of_it_goes_and_its_code_stays(
    own_model: Path, tmp_path: Path, tokens: Tensor
) -> None:
    out = tmp_path / "out"
    api.prune(
        str(own_model), method="shortgpt", sparsity=0.3, calib=tokens, out=out, dtype="float32",
        device="cpu", trust_remote_code=True, quiet=True,
    )  # fmt: skip
    files = MaskFiles(out)
    assert files.blocks is not None and len(files.blocks) == 2
    back = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(own_model, trust_remote_code=True)
    whole.stack = torch.nn.ModuleList(whole.stack[index] for index in files.blocks)
    assert torch.equal(back(tokens).logits, whole(tokens).logits)


def test_it_is_not_run_unasked(own_model: Path, tmp_path: Path, tokens: Tensor) -> None:
    with pytest.raises(UnsupportedModel, match="--trust-remote-code"):
        api.prune(own_model, sparsity=0.5, calib=tokens, out=tmp_path / "out")


def test_it_is_pruned_in_memory(own_model: Path, tokens: Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(own_model, trust_remote_code=True)
    assert api.prune(model, sparsity=0.5, calib=tokens, quiet=True).sparsity == 0.5
    assert float((model.stack[2].narrow.weight == 0).float().mean()) == 0.5
