"""Shards that WebDataset itself writes: md3 takes of each sample what WebDataset reads back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import programs
from program import make_pictures, records_of

from md3cli.source.braces import expanded

pytestmark = programs.MARKS
WRITE = """
import json, sys
import webdataset as wds
with wds.ShardWriter(sys.argv[2] + "/%05d.tar", maxcount=3, verbose=0) as shards:
    for number in range(8):
        content = open(f"{sys.argv[1]}/p{number}.png", "rb").read()
        fields = {"caption": f"picture {number}", "nested": {"a": [1, None]}, "seed": -1}
        sample = {"__key__": f"deep/{number:03d}", "json": fields, "cls": number, "txt": "ein \\u00dcber text"}
        shards.write(sample | ({"png": content} if number % 2 else {"left.png": content, "right.png": content}))
samples = {}
for name in range(3):
    for sample in wds.WebDataset(f"{sys.argv[2]}/{name:05d}.tar", shardshuffle=False).decode():
        fields = sample["json"] | {"txt": sample["txt"], "cls": sample["cls"]}
        samples |= {f"{name:05d}.tar/{sample['__key__']}.{kind}": fields for kind in sample if kind.endswith("png")}
print(json.dumps(samples))
"""


def test_samples_are_those_that_webdataset_reads(tmp_path: Path) -> None:
    program = programs.program("webdataset")
    make_pictures(tmp_path / "pictures", 8)
    (tmp_path / "shards").mkdir()
    samples = program.run(WRITE, tmp_path / "pictures", tmp_path / "shards")
    assert len(samples) == 12
    for typed in ("shards", "shards/{00000..00002}.tar", "shards/*.tar"):
        command = [sys.executable, "-m", "md3cli", "caption", typed, "--model", "tiny", "--length", "short"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert {record["image"]: record["meta"] for record in records_of(done.stdout)} == samples
        assert "not taken" not in done.stderr
    assert json.loads(done.stdout.splitlines()[0])["image"] in samples


def test_braces_are_those_of_webdataset() -> None:
    patterns = [
        "s/{00000..00031}.tar",
        "{train,val}-{0..3}.tar",
        "{08..11}",
        "{0..9..4}",
        "{a..e}/{b,c{1,2}}",
        "{x}",
        "a,b",
    ]
    script = (
        "import json, sys, braceexpand; print(json.dumps([list(braceexpand.braceexpand(x)) for x in sys.argv[1:]]))"
    )
    said = programs.program("webdataset").run(script, *patterns)
    assert [list(expanded(pattern)) for pattern in patterns] == said
