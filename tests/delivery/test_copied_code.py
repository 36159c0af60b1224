"""Code beside a model is copied to a place of ours, and the user's cache stays as it is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, dynamic_module_utils

from llmprune.arch.layout import BlockLayout, Layout
from llmprune.arch.miniature import miniature_config
from llmprune.delivery.copied_code import PACKAGE, code_in_scratch
from llmprune.delivery.heterogeneous import heterogeneous_config

WIDTHS = (32, 48)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of the user's cache of modules."""
    home = tmp_path / "cache"
    home.mkdir()
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(home))
    elsewhere = [place for place in sys.path if not Path(place, PACKAGE).is_dir()]
    monkeypatch.setattr(sys, "path", elsewhere)
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        monkeypatch.delitem(sys.modules, name)
    return home


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The config and the code of a Llama whose blocks differ in width."""
    config = miniature_config(AutoConfig.for_model("llama", num_hidden_layers=2)).to_dict()
    blocks = tuple(
        BlockLayout(source=index, sizes={"intermediate_size": width})
        for index, width in enumerate(WIDTHS)
    )
    config |= {"num_hidden_layers": len(blocks)}
    own, files = heterogeneous_config(config, Layout(blocks=blocks, shared={}), "E3")
    home = tmp_path / "own-model.partial"
    home.mkdir()
    (home / "config.json").write_text(json.dumps(own))
    for path in files:
        shutil.copy(path, home)
    return home


def built(folder: Path) -> torch.nn.Module:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    return AutoModelForCausalLM.from_config(config, trust_remote_code=True)


def widths(model: torch.nn.Module) -> tuple[int, ...]:
    return tuple(block.mlp.up_proj.out_features for block in model.model.layers)


def test_nothing_is_left_in_the_cache(cache: Path, folder: Path) -> None:
    with code_in_scratch():
        model = built(folder)
    assert widths(model) == WIDTHS
    assert list(cache.iterdir()) == []
    assert str(cache) == dynamic_module_utils.HF_MODULES_CACHE


def test_a_class_stays_usable_afterwards(cache: Path, folder: Path, tmp_path: Path) -> None:
    with code_in_scratch():
        model = built(folder)
    assert Path(sys.modules[type(model).__module__].__file__).is_file()
    model.set_attn_implementation("eager")  # reads the file of the class
    model.save_pretrained(tmp_path / "saved")  # copies it
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert widths(again) == WIDTHS


def test_the_cache_serves_before_and_after(cache: Path, folder: Path) -> None:
    (folder / "parts.py").write_text("ANSWER = 42\n")
    code = next(folder.glob("modeling_*.py"))
    code.write_text(code.read_text() + "\n\nfrom .parts import ANSWER\n")
    first = type(built(folder))
    held = sorted(path.relative_to(cache) for path in cache.rglob("*.py"))
    with code_in_scratch(), code_in_scratch():
        built(folder)
    assert sorted(path.relative_to(cache) for path in cache.rglob("*.py")) == held
    module = sys.modules[first.__module__]
    assert sys.modules[module.__package__].__path__[0].startswith(str(cache))
    assert widths(built(folder)) == WIDTHS


def test_an_error_inside_gives_the_cache_back(cache: Path) -> None:
    places = list(sys.path)
    with pytest.raises(KeyError), code_in_scratch():
        raise KeyError
    assert sys.path == places and str(cache) == dynamic_module_utils.HF_MODULES_CACHE


def test_the_scratch_is_gone_when_python_ends() -> None:
    """With an empty transformers, which is not what takes time here."""
    script = (
        "import os, sys, types\n"
        "library, places = types.ModuleType('transformers'), types.SimpleNamespace()\n"
        "library.dynamic_module_utils, places.HF_MODULES_CACHE = places, 'of the user'\n"
        "sys.modules['transformers'] = library\n"
        "from llmprune.delivery.copied_code import code_in_scratch\n"
        "with code_in_scratch():\n"
        "    os.mkdir(places.HF_MODULES_CACHE)\n"
        "    print(places.HF_MODULES_CACHE)\n"
        "assert places.HF_MODULES_CACHE == 'of the user'\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    place = Path(done.stdout.strip())
    assert place.name.startswith("llmprune-code-") and not place.exists()
