"""A file under the name that a list from elsewhere gives it, in an export as in a run."""

from __future__ import annotations

import unicodedata
from pathlib import Path

from md3cli.exporters import ExportOptions
from md3cli.exporters.pictures import Pictures


def test_an_export_finds_what_a_list_spelled_otherwise(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "m\u00fc.png")
    for name in ("sub/a.png", decomposed):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "r.jsonl").touch()
    pictures = Pictures(tmp_path / "r.jsonl", ExportOptions(root=tmp_path))
    for name, path in (("sub\\a.png", "sub/a.png"), (unicodedata.normalize("NFC", decomposed), decomposed)):
        found = pictures.find({"image": name, "sha256": None})
        assert found is not None
        assert found.path == str(tmp_path / path)
    assert pictures.find({"image": "..\\sub\\gone.png"}) is None
