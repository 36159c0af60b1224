"""What a run leaves of itself in the folder it works in."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmprune.base.errors import RecipeError
from llmprune.engine.records import check_out


def test_a_folder_that_was_only_begun_is_begun_again(tmp_path: Path) -> None:
    """A run that died before its record was whole leaves at most what these are."""
    out = tmp_path / "out"
    partial = tmp_path / "out.partial" / "llmprune"
    (partial / "records").mkdir(parents=True)
    (partial / ".run.json.tmp").write_text("{")
    (partial / "records" / "replaces").touch()
    check_out(out, None, overwrite=False)
    (partial / "records" / "note.txt").touch()
    with pytest.raises(RecipeError, match="holds something else"):
        check_out(out, None, overwrite=False)


def test_a_file_where_a_run_would_work_stays(tmp_path: Path) -> None:
    (tmp_path / "out.partial").touch()
    with pytest.raises(RecipeError, match="holds something else"):
        check_out(tmp_path / "out", None, overwrite=False)
