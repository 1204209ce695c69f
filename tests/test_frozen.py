"""What must not change by a byte when code is moved: formats, run folders, help, messages, names, ids.

The expected texts lie in tests/golden/frozen. A change that is meant is written there by

    UPDATE_FROZEN=1 pytest tests/test_frozen.py

and its difference belongs in the same commit. What depends on machine, time or version is masked by
the rules in MASKS; pictures that Pillow made are known by format, size and mode alone. The program is started
as a user does it, and of the package only public names are imported: no test here knows where a thing is defined.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import os
import re
import shlex
import socket
import struct
import tarfile
import tomllib
import zlib
from collections.abc import Mapping
from importlib import import_module, metadata
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image
from program import Program, clean_environment, isolate, records_of, start
from typer.testing import CliRunner

import md3cli
from md3cli.__main__ import main
from md3cli.cli import app

TESTS = Path(__file__).parent
FROZEN = TESTS / "golden" / "frozen"
SCENES = TESTS.parent / "examples" / "scenes"
IS_UPDATE = bool(os.environ.get("UPDATE_FROZEN"))
# Whose words help and errors are made of; other versions word them otherwise.
HELP_MADE_BY = {"typer": "0.29.2"}

HOST = re.sub(r"[^A-Za-z0-9-]+", "-", socket.gethostname())
MASKS: Mapping[str, tuple[str, str]] = {
    "time": (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", "<TIME>"),
    "date of a page": (r"\bon \d{4}-\d\d-\d\d\.", "on <DATE>."),
    "machine of a plan": (r"(<TIME> on )[^\"\n]+", r"\1<HOST>"),
    "attempt": (rf"{re.escape(HOST[:40])}-\d+-[0-9a-f]{{8}}", "<ATTEMPT>"),
    "machine": (r'("host": ?)"[^"]*"', r'\1"<HOST>"'),
    "process": (r'("pid": ?)\d+', r"\1<PID>"),
    "seconds": (r'("(?:elapsed_s|seconds|time|load|ended)": ?)[\d.]+', r"\1<NUMBER>"),
    "curve": (r'"timeline": \[.*?\n \]', '"timeline": <CURVE>'),
    "versions": (
        r'("(?:python|system|md3cli|md3|torch|tokenizers|safetensors|numpy|pillow|pyarrow|version)": )"[^"]*"',
        r'\1"<VERSION>"',
    ),
    "version of a page": (r"\b(md3|md3cli) \d+\.\d+\.\d[\w.]*", r"\1 <VERSION>"),
    "seal": (r'("seal": )"[0-9a-f]{64}"', r'\1"<SEAL>"'),
    "speed": (r"[\d.,]+ (s\b|img/s|images/s)", r"<NUMBER> \1"),
    # Told where there was time enough.
    "parts of a summary": (r" \([\d.,]+/s\)|, (?:files written|model loaded) in <NUMBER> s", ""),
    "machines": (r'("hosts": )\{[^}]*\}', r"\1{<HOSTS>}"),
    "speed as JSON": (r'("(?:rows_per_second|seconds_since_commit)": )[\d.]+', r"\1<NUMBER>"),
    "package": (r'"<PACKAGE>[^"]*"', '"<PACKAGE>"'),
    "stages of a shard": (r'("committed": true, "stages": )\{[^}]*\}', r"\1<NUMBERS>"),
    "config with a folder in it": (r'("config_hash": )"[0-9a-f]{16}"', r'\1"<DIGEST>"'),
    "holder of a lock": (r"(?m)^\d+ [\w.-]+$", "<PID> <HOST>"),
    "thumbnail": (r"data:image/[a-z]+;base64,[A-Za-z0-9+/=]+", "<THUMBNAIL>"),
    "run of a page": (r'"run":"[0-9a-f]{16}"', '"run":"<DIGEST>"'),  # of the folder
}


# -- comparing ---------------------------------------------------------------------------------------


def check(name: str, text: str) -> None:
    """`text` is what tests/golden/frozen/`name` says; with UPDATE_FROZEN it is written there."""
    path = FROZEN / name
    if IS_UPDATE:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
        return
    expected = path.read_bytes().decode()
    lines = difflib.unified_diff(expected.splitlines(), text.splitlines(), "frozen", "now", lineterm="", n=1)
    assert text == expected, f"{name} is no more as it was frozen:\n" + "\n".join(lines)


def masked(text: str) -> str:
    """`text` without what differs from one machine, folder or minute to the next."""
    text = text.replace(str(Path.cwd()), "<FOLDER>").replace(str(Path(md3cli.__file__).parent), "<PACKAGE>")
    for pattern, put in MASKS.values():
        text = re.sub(pattern, put, text, flags=re.DOTALL if "timeline" in pattern else 0)
    return text


def as_json(document: Any) -> str:
    return json.dumps(document, indent=1, ensure_ascii=False, default=shown_bytes) + "\n"


def shown_bytes(data: bytes) -> str:
    """Bytes as the picture that they are, or as Python writes them."""
    known = {content: name for name, content in PICTURES.items()}
    return f"<picture {known[data]}>" if data in known else repr(data)


def shown_file(path: Path) -> str:
    """A file's content, exactly, as far as it does not depend on the machine."""
    data = path.read_bytes()
    if data in PICTURES.values():
        return shown_bytes(data) + "\n"
    if path.suffix == ".parquet":
        return f"{data[:4]!r} ... {data[-4:]!r}\n" + shown_table(path)
    if path.suffix == ".png" and data.startswith(b"\x89PNG"):
        image = Image.open(BytesIO(data))
        return f"<made by Pillow: {image.format} {image.size} {image.mode}>\n"
    text = masked(data.decode())
    text = shown_page(text) if path.suffix == ".html" else text
    if path.name == ".md3":  # the names below are in the file system's order
        head, *names = text.splitlines(keepends=True)
        text = "".join([head, *sorted(names)])
    text = text.replace("\r", "<CR>")
    return text if text.endswith("\n") else f"{text}<no line feed at the end>\n"


def shown_table(path: Path) -> str:
    """A Parquet file's columns, row groups, own metadata and rows."""
    file = pq.ParquetFile(path)
    schema = file.schema_arrow
    own = {key.decode(): value.decode() for key, value in (file.metadata.metadata or {}).items()}
    own.pop("ARROW:schema", None)
    return as_json(
        {
            "columns": [[field.name, str(field.type), field.nullable] for field in schema],
            "rows of groups": [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)],
            "compression": sorted({file.metadata.row_group(0).column(i).compression for i in range(len(schema))}),
            "metadata": own,
            "rows": file.read(use_threads=False).to_pylist(),
        }
    )


def shown_page(text: str) -> str:
    """A page; of its style and program the digests."""

    def digest(found: re.Match[str]) -> str:
        return f"{found[1]}<sha256 {hashlib.sha256(found[2].encode()).hexdigest()}>{found[3]}"

    return re.sub(r"(<style>|<script>)(.*?)(</style>|</script>)", digest, text, flags=re.DOTALL)


def shown_tree(top: Path) -> str:
    """Every file below `top`, or `top` itself, by name, with its content; files of one masked name are one."""
    shown: dict[str, list[str]] = {}
    for path in [top] if top.is_file() else (path for path in top.rglob("*") if not path.is_dir()):
        shown.setdefault(masked(path.as_posix()), []).append(shown_file(path))
    return "".join(f"--- {name}\n{''.join(sorted(shown[name]))}" for name in sorted(shown))


# -- pictures ----------------------------------------------------------------------------------------


def png(width: int, height: int, red: int) -> bytes:
    """A PNG whose bytes no library decides: stored, not compressed; plain with a square in it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    def pixel(x: int, y: int) -> bytes:
        return b"\xf0\xf0\x20" if 8 <= x < 16 and 8 <= y < 16 else bytes((red, x, y))

    rows = b"".join(b"\0" + b"".join(pixel(x, y) for x in range(width)) for y in range(height))
    stored = b"\x78\x01\x01" + struct.pack("<HH", len(rows), len(rows) ^ 0xFFFF) + rows
    stored += struct.pack(">I", zlib.adler32(rows))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", stored) + chunk(b"IEND", b"")


PICTURES = {"a.png": png(40, 30, 10), "b c.png": png(24, 24, 90), "sub/ü.png": png(25, 50, 200)}


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A working folder with pictures, one broken, in `img`; no settings but what a test gives."""
    isolate(monkeypatch, tmp_path / "home")
    for name, value in {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}.items():
        monkeypatch.setenv(name, value)
    work = tmp_path / "work"
    for name, content in {**PICTURES, "bad.png": b"no picture"}.items():
        path = work / "img" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    monkeypatch.chdir(work)
    return work


@pytest.fixture
def md3(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """The program in this process, the stub in the model's place."""
    return Program(monkeypatch)


def told(md3: Program, line: str, *, stdin: str | None = None) -> str:
    """A command line, its exit status and all it printed."""
    result = md3(*shlex.split(line), stdin=stdin)
    text = f"$ md3 {line}\nstatus {result.exit_code}\n"
    for name, output in (("stdout", result.stdout), ("stderr", result.stderr)):
        if output:
            text += f"--- {name}\n{output}" + ("" if output.endswith("\n") else "<no line feed at the end>\n")
    return masked(text)


def told_outside(line: str, home: Path) -> str:
    """The same with a process of its own, where workers are started or run.json keeps the arguments."""
    process = start(*shlex.split(line), env=clean_environment(home))
    stdout, stderr = (masked(output.decode()) for output in process.communicate(timeout=240))
    return f"$ md3 {line}\nstatus {process.returncode}\n--- stdout\n{stdout}--- stderr\n{stderr}"


# -- formats -----------------------------------------------------------------------------------------

EXPORTS = {  # name -> options; RECORDS is tests/golden/frozen/records.jsonl
    "jsonl": "-f jsonl -o out.jsonl",
    "csv": "-f csv -o out.csv",
    "coco": "-f coco -o out.json",
    "coco-labels-keypoints": "-f coco --keypoints --label dog --label nose -o out.json",
    "coco-results": "-f coco --coco-results -o out.json",
    "coco-ids": "-f coco --coco-ids-from gt.json -o out.json",
    "yolo": "-f yolo -o out/",
    "yolo-link": "-f yolo --link -o out/",
    "voc": "-f voc -o out/",
    "parquet": "-f parquet -o out.parquet",
    "parquet-images": "-f parquet --embed-images -o out.parquet",
    "hf": "-f hf -o out/",
    "labelstudio": "-f labelstudio -o out/",
    "labelstudio-url": "-f labelstudio --url-prefix https://example.org/p/ -o out/",
    "labelme": "-f labelme -o out/",
    "labelme-beside": "-f labelme --beside -o img/",
    "cvat": "-f cvat -o out/",
    "txt": "-f txt -o out/",
    "txt-beside": "-f txt --beside -o img/",
    "overlay": "-f overlay -o out/",
    "overlay-background": "-f overlay --background white -o out/",
    "html": "-f html -o out.html",
    "stdout-coco": "-f coco",
    "stdout-csv": "-f csv",
}
GROUND_TRUTH = {
    "images": [{"id": 70, "file_name": "a.png"}, {"id": 7, "file_name": "b c.png"}],
    "categories": [{"id": 3, "name": "dog"}, {"id": 90, "name": "car"}],
    "annotations": [],
}


@pytest.mark.parametrize("name", EXPORTS)
def test_export(md3: Program, folder: Path, name: str) -> None:
    if name == "html":
        pytest.importorskip("jinja2")
    (folder / "records.jsonl").write_bytes((FROZEN / "records.jsonl").read_bytes())
    (folder / "gt.json").write_text(json.dumps(GROUND_TRUTH))
    line = f"export records.jsonl --root img {EXPORTS[name]}"
    text = told(md3, line)
    if "-o" in line:
        text += shown_tree(Path(line.split()[-1]))
    check(f"export-{name}.txt", text)


# -- run folders -------------------------------------------------------------------------------------

EVERYTHING = "--task caption --task 'query:How many?' --task detect:car --task point:nose --task segment:dog"


@pytest.mark.process
def test_run_folder_of_one_process(folder: Path, tmp_path: Path) -> None:
    formats = " ".join(f"-f {name}" for name in ("coco", "csv", "yolo", "voc", "labelstudio", "hf", "txt", "parquet"))
    text = told_outside(f"run img {EVERYTHING} -o out/ {formats}", tmp_path)
    check("run-folder.txt", text + shown_tree(Path("out")))


@pytest.mark.process
def test_records_file_of_one_process(folder: Path, tmp_path: Path) -> None:
    text = told_outside("detect img car person --max-objects 3 -o out.jsonl", tmp_path)
    text += told_outside("detect img car person --max-objects 3 -o out.jsonl --retry-failed", tmp_path)
    check("run-file.txt", text + shown_files("out*"))


@pytest.mark.process
def test_single_document_of_one_process(folder: Path, tmp_path: Path) -> None:
    text = told_outside("detect img car -o out.json", tmp_path)
    check("run-document.txt", text + shown_files("out*"))


def test_what_an_earlier_version_began_is_gone_on_with(md3: Program, folder: Path) -> None:
    """Two records are written, a third has come before its turn, the last line is torn; five are left to ask."""
    for path in (FROZEN / "begun").iterdir():
        (folder / path.name).write_bytes(path.read_bytes().replace(b"<FOLDER>", os.fsencode(folder)))
    text = told(md3, "detect img car person --max-objects 3 -o out.jsonl")
    assert md3.num_answered == 6 - 2 - 1
    check("run-begun.txt", text + shown_tree(Path("out.jsonl")))


def shown_files(pattern: str) -> str:
    return "".join(shown_tree(path) for path in sorted(Path().glob(pattern)))


@pytest.mark.process
def test_run_folder_of_two_workers(folder: Path, tmp_path: Path) -> None:
    """Its tree, its plan, what is said of it, and what the digest of its config is made of."""
    line = "detect img car car -o out/ -f csv --devices cpu --workers-per-device 2 --shard-size 2 --cache-size 1G"
    text = told_outside(line, tmp_path) + shown_tree(Path("out"))
    check("run-scaled.txt", text)
    plan = json.loads(Path("out/.md3run/plan/plan.json").read_bytes())
    digest = hashlib.sha256(json.dumps(plan["config"], sort_keys=True).encode()).hexdigest()
    assert plan["config_hash"] == digest[:16]
    check("run-scaled-told.txt", "".join(told_outside(each, tmp_path) for each in ABOUT_A_RUN))


ABOUT_A_RUN = (
    "status out --json",
    "verify out",
    "runs gc out",
    "export out -f csv",
    "detect img car car -o out/ -f csv --devices cpu --workers-per-device 2 --shard-size 2",
    "detect img car dog -o out/ -f csv --devices cpu",
    "detect img car -o out/",
)


def test_manifest_of_mixed_rows_in_shards(md3: Program, folder: Path) -> None:
    """Every column of a plan: rows that ask something else, carry something, cannot be read, are a member of a tar."""
    with tarfile.open("img.tar", "w") as tar:
        for name, content in PICTURES.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, BytesIO(content))
    rows = [
        {"image": "img/a.png", "task": "detect", "prompt": "dog", "row": 1},
        {"image": "img/a.png", "task": "detect", "prompt": "dog", "max_objects": 2},
        {"image": "img/a.png", "task": "caption", "length": "short"},
        {"image": "../outside.png", "task": "caption"},
        {"task": "query", "prompt": "Who?", "reasoning": False, "temperature": 0.5, "seed": 7},
        {"image": "img/b c.png", "task": "query", "prompt": "Is it?", "choices": ["yes", "no"]},
        {"image": "img/b c.png", "task": "segment", "prompt": "dog", "spatial_refs": [[0.5, 0.25]]},
        {"image": "img/b c.png", "task": "segment", "prompt": "dog", "spatial_refs": [[0.5, 0.25]]},
        {"image": "img/b c.png", "task": "dance"},
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{cut\n")
    text = told(md3, "run rows.jsonl -o rows/ --engine local --shard-size 4")
    text += told(md3, "run img.tar --task caption -o tar/ --engine local")
    for run in ("rows", "tar"):
        text += shown_tree(Path(run, ".md3run/plan")) + shown_tree(Path(run, "records.jsonl"))
    check("plans.txt", text)


# -- help and errors ---------------------------------------------------------------------------------

COMMANDS = [
    *("caption", "query", "detect", "point", "segment", "run", "estimate", "export", "report"),
    *("eval", "status", "verify", "runs", "models", "bench", "config", "cache", "doctor"),
]
SUBCOMMANDS = {
    "runs": ["gc"],
    "models": ["list", "pull", "info", "convert", "quantize", "verify"],
    "config": ["show"],
    "cache": ["info", "prune", "clear"],
}
HELP = ["", *COMMANDS, *(f"{name} {part}" for name, parts in SUBCOMMANDS.items() for part in parts)]


words_as_frozen = pytest.mark.skipif(
    {name: metadata.version(name) for name in HELP_MADE_BY} != HELP_MADE_BY, reason=f"these words are of {HELP_MADE_BY}"
)


@pytest.mark.process
@words_as_frozen
@pytest.mark.parametrize("command", HELP)
def test_help(md3: Program, command: str) -> None:
    name = f"help-{command or 'md3'}.txt".replace(" ", "-")
    check(name, told(md3, f"{command} --help".strip()))


USAGE_ERRORS = {
    "words": """
        detect --bogus
        detect
        detect img
        frob
        models frob
        detect img car --verbos
        detect img ''
        detect img img/a.png
        detect img @list.txt
        query
        query Where?
        query img
        query img ''
        run img
        run img --task dance
        run img --task caption:huge
        run img --task query:
        run img --task detect:
        run img --task detect:a,,b
        detect nowhere car
        detect 'none/*.jpg' car
        caption empty
        caption empty --allow-empty
        caption img extra.csv
    """,
    "values": """
        caption img --temperature x
        caption img --temperature -1
        caption img --top-p 0
        caption img --max-tokens 0
        caption img --seed -1
        caption img --length huge
        caption img --dtype fp64
        caption img --quant int3
        caption img --quant-vision int4
        caption img --batch-size 0
        caption img --batch-size many
        caption img --max-context 0
        caption img --cache-size much
        caption img --cache-dir ''
        caption img --max-pixels few
        caption img --max-file-size 1X
        caption img --fail-on 200%
        caption img --fail-on some
        caption img --shard 9
        caption img --shard 5/4
        caption img --limit -1
        caption img --decode-timeout 0
        caption img --decode-timeout x
        caption img --fetch-timeout 0
        caption img --workers -1
        caption img --format png -o x
        caption img --background octarine
        caption img --background '#12'
        query img -q 'Is it?' --choices yes
        query img -q 'Is it?' --choices yes,yes
        query img -q 'Is it?' --spatial-ref 2,2
        query img -q 'Is it?' --spatial-ref 0.5
        query img -q 'Is it?' --spatial-ref 0.5,0.5,0.1,0.1
        detect img car --max-objects 0
        estimate img --task caption --estimate-sample 0
        estimate img --task caption --price-per-1000 -1
        bench --config huge
        caption img --shard-size 0 -o x/
        caption img --workers-per-device 0 -o x/
        caption img --devices cpu,frob -o x/
        caption img --root ''
        cache prune --size some
        cache prune
        eval records.jsonl --gt gt.json --fail-under AP50=high
        eval records.jsonl --gt nowhere.json
        bench --device frob
        doctor --device frob --bogus
        eval records.jsonl
        export records.jsonl
        export records.jsonl -f labelstudio -o out.txt --url-prefix ''
    """,
    "outputs": """
        detect img car -o img/a.png
        detect img car -o records.jsonl
        detect img dog -o records.jsonl
        caption img -o x.unknown
        caption img -o x/ -f coco -f coco
        caption img -f coco -f csv
        caption img --retry-failed
        caption img --overwrite
        caption img -o new/deep/x.jsonl
        caption img -o x.jsonl --retry-failed --overwrite
        caption img -o x/ --worker-rank 3 --world-size 2
        caption img -o x/ --world-size 2 --overwrite
        caption img -o x/ --engine ray --devices cpu
        caption img --devices cpu
        caption img -o x/ --engine spark
        export nowhere.jsonl -f coco -o x.json
        export records.jsonl -f coco -o records.jsonl
        export records.jsonl -f coco -o there.json
        export records.jsonl -f yolo -o there/
        export records.jsonl -f yolo -o there/ --overwrite
        export records.jsonl -f yolo
        export records.jsonl -f what -o x
        report nowhere.jsonl -o x.html
        report records.jsonl -o there.json
        status nowhere
        verify records.jsonl
        runs gc nowhere
        models info nowhere
        models convert nowhere out --to raw
        models verify nowhere
        models list --json
        models info tiny --json
    """,
}


@pytest.mark.process
@words_as_frozen
@pytest.mark.parametrize("kind", USAGE_ERRORS)
def test_usage_errors(md3: Program, folder: Path, kind: str) -> None:
    """Also a few that are none, beside those that are."""
    (folder / "records.jsonl").write_bytes((FROZEN / "records.jsonl").read_bytes())
    (folder / "empty").mkdir()
    (folder / "there").mkdir()
    for name in ("there.json", "there/mine.txt", "list.txt", "extra.csv"):
        (folder / name).write_text("[]")
    lines = USAGE_ERRORS[kind].split("\n")
    check(f"errors-{kind}.txt", "\n".join(told(md3, line.strip()) for line in lines if line.strip()))


# -- ids ---------------------------------------------------------------------------------------------

ASKED = """
caption img
caption img --length short
caption img --length long --temperature 0.7 --top-p 0.5 --seed 3
caption img --model other
caption img --dtype fp32
caption img --dtype bf16 --quant int4
caption img --quant int8 --quant-vision int8 --device cpu
caption img --adapter lora
caption img --background white
caption img --background none --cache-size 3G --batch-size 2
query img -q 'How many?'
query img -q 'How many?' -q 'How many?'
query img -q 'How many?' --no-reasoning
query img -q 'Is it red?' --choices yes,no
query img -q 'What is there?' --spatial-ref 0.5,0.25 --spatial-ref 0.1,0.1,0.5,0.5
query -q 'Who are you?'
query -q 'Wer bist du, Ä?' --max-tokens 7
detect img car 'red circle' --max-objects 3
point img nose
segment img dog
segment img dog --spatial-ref 0.5,0.5
run img --task caption:short --task detect:car,dog --task 'query:Why?' --task point:nose --task segment:tail
"""


@pytest.mark.process
def test_ids(md3: Program) -> None:
    """The ids of requests, which must be the same for ever."""
    ids = {}
    for line in ASKED.strip().splitlines():
        result = md3(*shlex.split(line), "--quiet", "--fail-on", "none")
        assert result.exit_code == 0, (line, result.stderr)
        found = [(record["image"], record["id"]) for record in records_of(result.stdout)]
        ids[line] = {str(image): [other for name, other in found if name == image] for image, _ in found}
    check("ids.json", as_json(ids))


# -- names -------------------------------------------------------------------------------------------


def signature(thing: Any) -> str:
    """Names, kinds and defaults of the arguments; annotations may be said otherwise."""
    found = inspect.signature(thing)
    plain = [argument.replace(annotation=inspect.Parameter.empty) for argument in found.parameters.values()]
    return str(found.replace(parameters=plain, return_annotation=inspect.Signature.empty))


def members(kind: type, names: str = "") -> dict[str, str]:
    """Signatures of the methods that have these names, or any public name; what else a member is."""
    found = {}
    for name in names.split() or [name for name in dir(kind) if not name.startswith("_")]:
        member = inspect.getattr_static(kind, name)
        function = getattr(member, "__func__", member)
        of_what = type(member).__name__
        found[name] = f"{of_what} {signature(function)}" if inspect.isfunction(function) else of_what
    return found


SKILLS = "caption compile detect encode_image point query segment"
FOR_TRANSFORMERS = {  # what transformers and a training script use; the rest is no promise
    "Moondream3Config": "__init__ from_network image_token_id model_type network",
    "Moondream3ForConditionalGeneration": "__init__ forward from_pretrained save_pretrained get_input_embeddings "
    f"get_output_embeddings base_model_prefix config_class main_input_name {SKILLS}",
    "Moondream3Output": "__init__",
    "Moondream3Processor": "__init__ __call__ apply_chat_template batch_decode collate decode from_pretrained "
    "get_attributes model_input_names save_pretrained",
}


def test_public_names() -> None:
    hf = import_module("md3cli.model.hf")
    assert sorted(hf.__all__) == sorted(FOR_TRANSFORMERS)
    found = {
        "md3cli": sorted(md3cli.__all__),
        "Moondream": {"__init__": signature(md3cli.Moondream), **members(md3cli.Moondream)},
        "model_path": signature(md3cli.model_path),
        "md3cli.model.hf": {name: members(getattr(hf, name), names) for name, names in FOR_TRANSFORMERS.items()},
        "model_type": hf.Moondream3Config.model_type,
    }
    check("names.json", as_json(found))


def test_entry_points() -> None:
    project = tomllib.loads((TESTS.parent / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"md3": "md3cli.__main__:main"}
    assert callable(main)
    (script,) = metadata.entry_points(group="console_scripts", name="md3")
    assert script.load() is main


# -- the small model ---------------------------------------------------------------------------------

NUMBER_TOLERANCE, SCORE_TOLERANCE = 0.02, 0.05  # a bin of a place, and what processors differ by


def assert_alike(found: Any, expected: Any, key: str = "") -> None:
    """The same, but for numbers from 0 to 1 and for outlines, which another processor may make a little otherwise."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert_alike(found[name], value, name)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_alike(one, other, key)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=SCORE_TOLERANCE if key == "score" else NUMBER_TOLERANCE), key
    elif key == "svg_path":
        assert found.startswith("M "), found
    elif key != "output":  # tokens of an outline
        assert found == expected, key


def check_alike(name: str, records: list[dict[str, Any]]) -> None:
    if IS_UPDATE:
        check(name, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    assert_alike(records, records_of(FROZEN / name))


TINY = (
    "run scene_00001.png --task caption --task 'query:How many shapes are there?' --task 'detect:yellow diamond' "
    "--task point:shape --task 'segment:red star' --model tiny --device cpu --dtype fp32 --cache-dir encodings "
    "--no-compile --quiet"
)


@pytest.mark.process
def test_records_of_the_small_model(folder: Path) -> None:
    """The real engine: keys in their order, words, ids; and the file that keeps the picture's encoding."""
    (folder / "scene_00001.png").write_bytes((SCENES / "scene_00001.png").read_bytes())
    result = CliRunner().invoke(app, shlex.split(TINY), prog_name="md3")
    assert result.exit_code == 0, result.stderr
    check_alike("tiny.jsonl", records_of(result.stdout))
    encodings = [path for path in Path("encodings").rglob("*") if path.is_file()]
    shown = {path.as_posix(): repr(path.read_bytes()[:10]) for path in sorted(encodings)}
    check("encodings.json", as_json(shown))


def test_ids_and_keys_of_the_python_face(folder: Path) -> None:
    model = md3cli.Moondream.load("tiny", device="cpu", dtype="fp32")
    asked = [
        {
            "image": str(SCENES / "scene_00001.png"),
            "name": "one",
            "task": "point",
            "prompt": "white cross",
            "meta": {"k": 1},
        },
        {"image": None, "task": "query", "prompt": "How many sides has a square?", "reasoning": False},
        {"image": "nowhere.png", "task": "caption", "length": "short"},
    ]
    found = list(model.annotate(asked))
    check_alike("annotate.jsonl", found)
