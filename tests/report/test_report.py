"""report: what the page holds, how it is paged, and that nothing in a record becomes markup."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from report_runs import BOXES, HOSTILE, SIZES, found, picture, record, write_run
from typer.testing import CliRunner

from md3cli.commands.report import app
from md3cli.errors import InputError, MissingExtraError, UsageError
from md3cli.exporters.grouping import Survey
from md3cli.finished.run_json import RunInfo
from md3cli.refine.collection import as_collection
from md3cli.report.build import ReportOptions, _template, render, write_report
from md3cli.report.index import in_pieces, joined_json, safe_json, script_of
from md3cli.report.items import FRAME, entry_of, items
from md3cli.report.page import Page, facets_of, legible, palette_of, signs_of
from md3cli.report.plots import RunStats, duration, nice_ceiling, run_facts, run_plots, short_number


class Elements(HTMLParser):
    """All start tags of a page with their attributes, the text of style and script, and the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[str, dict[str, str | None], str]] = []
        self.text: list[str] = []
        self.names: list[str] = []
        self._inside: tuple[str, dict[str, str | None]] = ("", {})
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = self.tags[-1]

    handle_startendtag = handle_starttag

    def handle_endtag(self, tag):
        self._inside = ("", {})

    def handle_data(self, data):
        tag, attrs = self._inside
        if tag in ("style", "script"):
            self.raw.append((tag, attrs, data))
        else:
            (self.names if tag == "bdi" else self.text).append(data)

    def of(self, tag, **wanted):
        return [a for t, a in self.tags if t == tag and all(a.get(k) == v for k, v in wanted.items())]

    def data(self):
        return json.loads(next(text for tag, attrs, text in self.raw if attrs.get("id") == "data"))

    def cards(self):
        return [card for piece in self.data()["cards"] for card in piece]

    def shapes(self):
        return [(card, shape) for card in self.cards() for one in card["records"] for shape in one.get("shapes", ())]


def texts_in(value) -> Iterator[str]:
    """All strings of a document but thumbnails."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from () if key == "thumbnail" else texts_in(one)
    elif isinstance(value, list):
        for one in value:
            yield from texts_in(one)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def page(run_folder):
    output = run_folder / "report.html"
    summary = write_report(run_folder / "records.jsonl", output, ReportOptions())
    assert (summary.num_images, summary.num_missing, summary.folder) == (4 + len(HOSTILE), 1 + len(HOSTILE), None)
    return Elements(output.read_text())


def test_the_policy_allows_its_own_style_and_script_and_nothing_else(page):
    (policy,) = (a["content"] for a in page.of("meta", **{"http-equiv": "Content-Security-Policy"}))
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives["default-src"] == "'none'"
    assert directives["img-src"] == "data:"
    style, _, script = page.raw
    for name, (_, _, text) in (("style-src", style), ("script-src", script)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert directives[name] == f"'sha256-{digest}'"
    assert directives.keys() == {"default-src", "img-src", "style-src", "script-src", "base-uri", "form-action"}


def test_nothing_leads_outside_and_nothing_is_inline(page):
    for tag, attributes in page.tags:
        assert tag not in ("iframe", "object", "embed", "base", "foreignobject", "use", "image")
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in ("style", "srcset", "action", "formaction", "xlink:href")
            if name in ("src", "href"):
                assert value.startswith("data:")
    assert not re.search(r"https?://|url\(|@import", page.raw[0][2])
    script = page.raw[2][2].replace('const SVG = "http://www.w3.org/2000/svg";', "")  # a name, never asked for
    assert not re.search(
        r"https?://|fetch\(|innerHTML|outerHTML|insertAdjacentHTML|DOMParser|eval\(|Function\(", script
    )


def test_hostile_text_stays_text(page):
    assert len(page.of("script")) == 2
    assert not page.of("svg", onload="window.pwned=1")
    assert all(card["thumbnail"].startswith("data:image/jpeg;base64,") for card in page.cards() if "thumbnail" in card)
    written = list(texts_in(page.cards()))
    for text in HOSTILE:
        assert text.replace("\u2028", "\\u2028").replace("\u202e", "\\u202e").replace("\x07", "\\x07") in written
    assert not {"\u2028", "\u202e", "\x07"} & set("".join((*page.text, *written)))
    assert any("{{ 7 * 7 }}" in text for text in written)
    (index,) = page.data()["index"]
    assert set(HOSTILE) < set(index["images"])  # exact: the marks' file needs it
    assert index["records"][5:] == [4] * len(HOSTILE)


def html_of(text: str) -> str:
    """A page on which everything that can be text is `text`."""
    grounding = [{"start_idx": 0, "end_idx": 1, "points": [[0.5, 0.5]]}]
    records = [
        record(text, "caption", length=text, caption=text),
        record(text, "query", text, answer=text, reasoning={"text": "x" + text, "grounding": grounding}),
        record(text, "detect", text, objects=[found(text, (0.1, 0.1, 0.5, 0.5)), found("b", (0.1, 0.1, 0.5, 0.5))]),
        record(text, "detect", text, error="io") | {"error": {"type": text, "message": text, "retry": True}},
    ]
    for one in records:
        one["model"] = text
    stats, pieces = RunStats(), []
    shown = list(items(records))
    for item in shown:
        stats.add(item)
        item.missing = text
    palette = palette_of(stats.palette_labels)
    overview = Page(text, run_facts(stats), facets=facets_of(stats, palette), signs=signs_of(stats.kinds, 2))
    assert list(in_pieces(shown, lambda kind, number, piece, size: pieces.append(piece))) == shown
    data = joined_json({"labels": palette.document(), "name": text}, {"pieces": pieces})
    return b"".join(render(replace(overview, plots=run_plots(stats, RunInfo({}))), data)).decode()


def tags_with(text: str) -> list[tuple[str, list[str]]]:
    """Tags and attribute names of that page."""
    return [(tag, sorted(attributes)) for tag, attributes in Elements(html_of(text)).tags]


@pytest.mark.process
@settings(deadline=None, max_examples=40)
@given(st.text(alphabet=st.sampled_from("<>\"'`&;=/!-[]{}% \0\n\u2028aonscriptsvg:#\ud800"), min_size=1, max_size=40))
def test_no_text_changes_the_markup(text):
    assert tags_with("#" + text) == tags_with("#x")


@given(st.text(min_size=1))
def test_no_text_leaves_the_string_of_a_script_file(text):
    """What the page parses is what was written, and the file's one raw string has no end but its own."""
    script = script_of("stamp", "cards-00001", safe_json([text, {text: "`${x}\\"}]))
    assert script.isascii()
    match = re.fullmatch(r'md3\("stamp","cards-00001",String\.raw`([^`$<>&]*)`\);\n', script)
    assert json.loads(match[1]) == [text, {text: "`${x}\\"}]


def test_file_names_cannot_steer_the_reader(page):
    names = [card["name"] for card in page.cards()]
    assert len(names) == len(SIZES) + len(HOSTILE) + 2
    assert "]]>\\u2028\\u202eevil\\x07" in names


def test_every_record_is_on_the_page_and_in_its_data(page, run_folder):
    lines = (run_folder / "records.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    (index,) = page.data()["index"]
    assert index["ids"] == [one["id"] for one in records]
    assert [one["status"] for card in page.cards() for one in card["records"]] == [
        ("ok", "empty", "failed")[status] for status in index["statuses"]
    ]
    assert sum(index["records"]) == len(records) == len(index["texts"])
    word = index["words"].__getitem__
    assert (word(index["tasks"][0]), word(index["prompts"][0]), index["statuses"][0]) == ("detect", "red", 0)
    assert (index["objects"][0], word(index["labels"][0]), index["scores"][0]) == (1, "red", 0.9)
    assert index["statuses"][1] == 1
    gone = sum(index["records"][: index["images"].index("gone.png")])
    assert index["statuses"][gone] == 2
    assert index["texts"][gone] == "not_found: it did not work"
    assert sum(index["objects"]) == len(index["labels"]) == len(index["scores"])


def test_thumbnails_are_small_upright_jpegs(page):
    sources = [card["thumbnail"] for card in page.cards() if "thumbnail" in card]
    assert len(sources) == len(SIZES)
    for source, (width, height) in zip(sources, SIZES, strict=True):
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as thumbnail:
            assert thumbnail.format == "JPEG"
            assert max(thumbnail.size) == 320
            assert thumbnail.width / thumbnail.height == pytest.approx(width / height, rel=0.02)


def test_boxes_are_drawn_in_the_picture_s_own_units(page):
    frames = [[0, 0, *card["frame"]] for card in page.cards()]
    rects = [shape["rect"] for _, shape in page.shapes() if "rect" in shape]
    for frame, box, size in zip(frames, BOXES, SIZES, strict=False):
        scale = min(FRAME[0] / size[0], FRAME[1] / size[1])
        assert frame[2:] == pytest.approx([size[0] * scale, size[1] * scale], abs=0.01)
        x, y = box[0] * frame[2], box[1] * frame[3]
        wide, tall = (box[2] - box[0]) * frame[2], (box[3] - box[1]) * frame[3]
        assert any(one == pytest.approx([x, y, wide, tall], abs=0.02) for one in rects)


def test_a_mask_is_drawn_from_numbers_only(page):
    paths = [shape["path"] for _, shape in page.shapes() if "path" in shape]
    assert "M80,80 240,80 240,160Z" in paths
    assert all(re.fullmatch(r"[MLZ0-9,. -]+", path) for path in paths)


def test_reasoning_is_cut_where_it_is_grounded(run_folder):
    records = [json.loads(line) for line in (run_folder / "records.jsonl").read_text().splitlines()]
    entry = next(e for item in items(records) for e in item.entries if e.reasoning)
    assert [passage.text for passage in entry.reasoning] == ["The ", "red box ", "is h", "", "ere."]
    assert [len(passage.points) for passage in entry.reasoning] == [0, 2, 0, 1, 0]
    assert "".join(passage.text for passage in entry.reasoning) == "The red box is here."


@given(
    st.text(max_size=30),
    st.lists(st.tuples(st.integers(-3, 40), st.integers(-3, 40)), max_size=5),
)
def test_any_grounding_keeps_the_text_whole(text, spans):
    grounding = [{"start_idx": start, "end_idx": end, "points": [[0.5, 0.5]]} for start, end in spans]
    one = record("a", "query", "q", answer="x", reasoning={"text": text, "grounding": grounding})
    passages = entry_of(one, FRAME).reasoning
    assert "".join(passage.text for passage in passages) == text
    assert sum(bool(passage.points) for passage in passages) == len(spans)


@pytest.mark.parametrize(
    "result",
    [
        {"task": "detect", "objects": [{"label": "a"}]},
        {"task": "detect", "objects": [found("a", (0, 0, float("nan"), 1))]},
        {"task": "detect", "objects": None},
        {"task": "caption"},
        {"task": "query", "answer": 3},
        {"task": "dance"},
        {"task": "query", "error": "model", "answer": "x"},
    ],
)
def test_a_damaged_record_is_named(result):
    one = record("a.png", **result)
    if "error" in result:
        one["error"] = "just a word"
    with pytest.raises(InputError, match=one["id"]):
        entry_of(one, FRAME)


def test_an_answer_among_choices_shows_the_score_of_each(tmp_path):
    one = record("a.png", "query", "Red?", answer="yes", choices={"yes": 0.91, "no": 0.09})
    two = record("a.png", "query", "Why?", answer="")
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (one, two)))
    write_report(tmp_path / "records.jsonl", tmp_path / "r.html", ReportOptions())
    page = Elements((tmp_path / "r.html").read_text())
    first, second = page.cards()[0]["records"]
    assert first["choices"] == [["yes", 0.91], ["no", 0.09]]
    assert second["text"] == ""
    (index,) = page.data()["index"]
    assert (index["objects"], index["labels"], index["scores"]) == ([1, 0], [-1], [0.91])


def test_neighbouring_records_of_one_picture_share_a_card():
    names = ["a", "a", "b", "a", None, None]
    shown = list(items(record(name, "caption", caption="x") for name in names))
    assert [len(item.entries) for item in shown] == [2, 1, 1, 1, 1]


def test_what_is_said_of_an_object_stands_behind_what_found_it():
    objects = [found("red", box) for box in BOXES[:2]]
    finder = record("a", "detect", "red", objects=objects)
    regions = [{k: v for k, v in thing.items() if k != "score"} | {"of": finder["id"]} for thing in objects]
    asked = [record("a", "query", "Old?", answer="x") | {"region": one | {"index": n}} for n, one in enumerate(regions)]
    lost = record("a", "query", "Old?", answer="x") | {"region": regions[0] | {"of": "7", "index": 0}}
    failed = record("a", "query", "New?", error="model") | {"region": regions[0] | {"index": 0}}
    (item,) = items([asked[1], lost, record("a", "caption", caption="x"), finder, failed, asked[0]])
    parts = [(entry.task, entry.part and entry.part.name) for entry in item.entries]
    assert parts == [
        ("query", "red #7"),  # of a record that is not here
        ("caption", None),
        ("detect", None),
        ("query", "red 1"),
        ("query", "red 1"),
        ("query", "red 2"),
    ]
    assert item.entries[3].status == "failed"
    assert item.entries[5].part.rect == item.entries[2].shapes[1].rect


def test_what_answers_are_about_is_no_filter_of_objects():
    region = {"x_min": 0.1, "y_min": 0.1, "x_max": 0.5, "y_max": 0.5, "of": "7"}
    asked = [
        record("a", "query", f"Is the {label} old?", answer="x") | {"region": region | {"label": label, "index": n}}
        for n, label in enumerate(("car", "dog"))
    ]
    stats = RunStats()
    for item in items(asked):
        stats.add(item)
    assert [facet.name for facet in facets_of(stats, palette_of(stats.coloured))] == ["mark", "prompt"]


def parsed(path):
    """What a script file hands to the page: stamp, name, document."""
    match = re.fullmatch(r'md3\("([^"]+)","([^"]+)",String\.raw`([^`]*)`\);\n', path.read_text())
    return match[1], match[2], json.loads(match[3])


def test_many_pictures_go_to_script_files_beside_the_page(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("md3cli.report.index.CARDS_SIZE", 3)
    monkeypatch.setattr("md3cli.report.index.INDEX_SIZE", 5)
    output = tmp_path / "out folder" / "look here.html"
    options, ticks = ReportOptions(images_per_page=3, images_in_file=10), []
    monkeypatch.setattr("md3cli.refine.collection.RECORDS_TOLD", 1)
    told = replace(as_collection(run_folder / "records.jsonl"), told=lambda *far: ticks.append(far))
    summary = write_report(told, output, options)
    folder = output.parent / "look here_pages"
    assert summary.folder == folder
    assert ticks == [(number, None) for number in range(summary.num_records)]
    page = Elements(output.read_text())
    files = page.data()["files"]
    assert (files["folder"], files["index"], files["cards"]) == ("look%20here_pages", 3, 4)
    assert f" 'nonce-{files['stamp']}';" in page.of("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert len(files["stamp"]) >= 22  # 128 bits that nobody can know
    assert page.data().keys() & {"index", "cards"} == set()
    names = [f"{kind}-{number:05d}" for kind, count in (("cards", 4), ("index", 3)) for number in range(1, count + 1)]
    assert sorted(path.name for path in folder.glob("*")) == sorted([*(f"{name}.js" for name in names), ".md3"])
    read = {name: parsed(folder / f"{name}.js") for name in names}
    assert all((stamp, said) == (files["stamp"], name) for name, (stamp, said, _) in read.items())
    whole = tmp_path / "whole.html"
    write_report(run_folder / "records.jsonl", whole, ReportOptions())
    cards = [card for name in names if name.startswith("cards") for card in read[name][2]]
    assert cards == Elements(whole.read_text()).cards()
    ids = [record for name in names if name.startswith("index") for record in read[name][2]["ids"]]
    assert ids == [record for piece in Elements(whole.read_text()).data()["index"] for record in piece["ids"]]


def test_a_folder_beside_the_page_is_replaced_only_where_it_is_ours(run_folder, tmp_path):
    output, folder = tmp_path / "r.html", tmp_path / "r_pages"
    records, large = run_folder / "records.jsonl", ReportOptions(images_per_page=3, images_in_file=3)
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError):
        write_report(records, output, replace(large, overwrite=True))
    assert (folder / "thesis.txt").read_text() == "mine"
    write_report(records, output, ReportOptions(overwrite=True))  # needs no folder, and leaves it alone
    assert (folder / "thesis.txt").exists()
    (folder / "thesis.txt").unlink()
    write_report(records, output, replace(large, overwrite=True))
    first = Elements(output.read_text()).data()["files"]["stamp"]
    with pytest.raises(UsageError, match="--overwrite"):
        write_report(records, output, large)
    write_report(records, output, replace(large, overwrite=True))
    assert parsed(folder / "index-00001.js")[0] == Elements(output.read_text()).data()["files"]["stamp"] != first
    write_report(records, output, ReportOptions(overwrite=True))
    assert not folder.exists()  # what a report of one file does not need is gone


def test_marks_are_kept_for_all_reports_of_the_same_pictures(run_folder, tmp_path):
    lines = (run_folder / "records.jsonl").read_text().splitlines(keepends=True)
    run = json.loads((run_folder / "run.json").read_text())
    keys = []
    for name, chosen, root in (("all", lines, run["root"]), ("few", lines[3:6], run["root"]), ("x", lines, "/else")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "records.jsonl").write_text("".join(chosen))
        (tmp_path / name / "run.json").write_text(json.dumps(run | {"root": root}))
        write_report(tmp_path / name / "records.jsonl", tmp_path / name / "r.html", ReportOptions())
        keys.append(Elements((tmp_path / name / "r.html").read_text()).data()["run"])
    assert keys[0] == keys[1] != keys[2]


def test_a_report_of_nothing_is_told(tmp_path):
    (tmp_path / "records.jsonl").touch()
    with pytest.raises(InputError, match="no records"):
        write_report(tmp_path / "records.jsonl", tmp_path / "r.html", ReportOptions())
    assert not (tmp_path / "r.html").exists()


def test_without_jinja_the_extra_is_named_before_any_work(run_folder, tmp_path, monkeypatch):
    _template.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r"md3cli\[report\]"):
        write_report(run_folder / "records.jsonl", tmp_path / "r.html", ReportOptions())
    assert list(tmp_path.iterdir()) == []


def test_a_picture_outside_the_root_is_not_opened(run_folder, tmp_path):
    picture(tmp_path / "secret.png", BOXES[0])
    (tmp_path / "in").mkdir()
    one = record("../secret.png", "caption", caption="x")
    (tmp_path / "records.jsonl").write_text(json.dumps(one) + "\n")
    summary = write_report(tmp_path / "records.jsonl", tmp_path / "r.html", ReportOptions(root=tmp_path / "in"))
    assert summary.num_missing == 1
    assert "data:image" not in (tmp_path / "r.html").read_text()


def test_the_command_s_options_reach_the_page(run_folder, tmp_path):
    arguments = [str(run_folder), "-o", str(tmp_path / "out"), "--title", "<My> run", "--thumbnail-size", "64"]
    result = CliRunner().invoke(app, [*arguments, "--images-per-page", "6"])
    assert result.exit_code == 0, result.output
    assert "index.html: 11 images, 40 records" in result.stderr
    assert "note: 8 pictures cannot be opened" in result.stderr
    overview = Elements((tmp_path / "out" / "index.html").read_text())
    assert "<My> run" in overview.text
    assert overview.data()["perPage"] == 6
    with Image.open(io.BytesIO(base64.b64decode(overview.cards()[0]["thumbnail"].partition(",")[2]))) as thumbnail:
        assert max(thumbnail.size) == 64


def test_the_page_is_opened_only_when_it_is_written_and_asked_for(run_folder, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or len(opened) < 2)
    page = tmp_path / "a b.html"
    assert CliRunner().invoke(app, [str(run_folder), "-o", str(page)]).exit_code == 0
    assert opened == []
    again = CliRunner().invoke(app, [str(run_folder), "-o", str(page), "--open"])
    assert isinstance(again.exception, UsageError)
    assert opened == []
    result = CliRunner().invoke(app, [str(run_folder), "-o", str(page), "--open", "--overwrite"])
    assert opened == [page.resolve().as_uri()]
    assert "no browser" not in result.stderr
    result = CliRunner().invoke(app, [str(run_folder), "-o", str(page), "--open", "--overwrite"])
    assert f"note: no browser could be started; open {page} yourself" in result.stderr


def test_the_command_scores_by_ground_truth_and_draws_what_was_missed(tmp_path):
    picture(tmp_path / "a.png", BOXES[0])
    one = record("a.png", "detect", "red", objects=[found("red", BOXES[0]), found("red", (0.6, 0.6, 0.9, 0.9), 0.2)])
    (tmp_path / "records.jsonl").write_text(json.dumps(one) + "\n")
    truth = {
        "images": [{"id": 1, "file_name": "a.png", "width": 400, "height": 200}],
        "categories": [{"id": 1, "name": "red"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [40, 40, 160, 100], "area": 16000, "iscrowd": 0},
            {"id": 2, "image_id": 1, "category_id": 1, "bbox": [300, 0, 50, 50], "area": 2500, "iscrowd": 0},
        ],
    }
    (tmp_path / "gt.json").write_text(json.dumps(truth))
    arguments = [str(tmp_path / "records.jsonl"), "-o", str(tmp_path / "r.html"), "--root", str(tmp_path)]
    result = CliRunner().invoke(app, [*arguments, "--gt", str(tmp_path / "gt.json")])
    assert result.exit_code == 0, result.output
    assert result.stderr.endswith("r.html: 1 images, 1 records\n")
    page = Elements((tmp_path / "r.html").read_text())
    (judged,) = page.cards()[0]["records"]
    assert [shape["verdict"] for shape in (*judged["shapes"], *judged["missed"])] == ["right", "wrong", "missed"]
    assert judged["verdict"] == "wrong"
    assert page.data()["index"][0]["verdicts"] == [2]
    visible = "".join(page.text)
    assert "Boxes by ground truth" in visible
    for sign in ("solid: right", "dashed: wrong", "white, dashed: missed"):
        assert sign in visible
    assert isinstance(CliRunner().invoke(app, [*arguments]).exception, UsageError)  # r.html is there
    assert isinstance(CliRunner().invoke(app, [arguments[0], "-o", "x.pdf"]).exception, UsageError)


# ---- counts and plots ----------------------------------------------------------------------------


def test_the_plots_count_what_the_records_say(run_folder):
    stats = RunStats()
    for item in items(json.loads(line) for line in (run_folder / "records.jsonl").read_text().splitlines()):
        stats.add(item)
    assert stats.errors == {"not_found": 1}
    assert stats.objects_per_image[3] == 2  # picture 0 (box, mask, point) and picture 2
    assert stats.labels["red"] == 8
    assert stats.score_bins[18] == 1 + len(HOSTILE)  # 0.90
    assert stats.answers["How many?"] == {"One": 1}
    run = RunInfo(json.loads((run_folder / "run.json").read_text()))
    plots = {plot.title: plot for plot in run_plots(stats, run)}
    assert sum(column.height > 0 for column in plots["Objects per image"].columns) == len(stats.objects_per_image)
    assert plots["Objects by label"].bars[0].name == "red"
    assert plots["Errors by type"].bars[0].pick == "error:not_found"
    assert plots["Throughput"].lines[0].path.count("L") == 8
    assert [bar.name for bar in plots["Time by stage"].bars] == ["generate", "decode"]


def test_empty_counts_make_no_plots():
    assert run_plots(RunStats(), RunInfo({})) == []


@given(st.floats(1e-6, 1e12))
def test_an_axis_ends_above_its_largest_value_and_not_far(value):
    assert value * (1 - 1e-6) <= nice_ceiling(value) <= value * 2.01


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (950, "950"), (1200, "1.2k"), (3_400_000, "3.4M"), (0.25, "0.25")]
)
def test_numbers_are_short(value, text):
    assert short_number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (0.51, "0.5 s"), (5, "5 s"), (12.3, "12 s"), (90, "1:30"), (59.7, "1:00"), (4000, "1:06:40")],
)
def test_durations_read_as_clocks(seconds, text):
    assert duration(seconds) == text


STEERING = "\x1b[31m\x9b2J\u202e\u2066\x00\x7f\u200b\ufeff\r"


def test_no_character_turns_or_hides_what_is_read(tmp_path):
    text = f"a{STEERING}b"
    bbox = {"x_min": 0, "y_min": 0, "x_max": 1, "y_max": 1}
    records = [
        record(text, "caption", length=text, caption=text),
        record(text, "query", text, answer=text, reasoning={"text": text, "grounding": []}, choices={text: 0.5}),
        record(text, "detect", text, objects=[found(text, (0.1, 0.1, 0.5, 0.5)), found("x" + text, (0, 0, 1, 1))]),
        record(text, "segment", text, segments=[{"label": text, "svg_path": "", "bbox": bbox, "parse_error": text}]),
        record(text, "detect", text, error=text) | {"model": text},
    ]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    (tmp_path / "run.json").write_text(json.dumps({"stages": {text: 1.0}}))
    write_report(tmp_path / "records.jsonl", tmp_path / "r.html", ReportOptions(title=text))
    page = (tmp_path / "r.html").read_bytes().decode()
    assert [char for char in STEERING if char in page and not char.isalnum() and char != "["] == []
    assert page.count("\\x1b[31m\\x9b2J\\u202e\\u2066") > 10


def test_joiners_of_emoji_and_line_ends_stay():
    assert legible("👩\u200d🚀\n\tمی\u200cخواهم") == "👩\u200d🚀\n\tمی\u200cخواهم"


def test_names_that_only_look_equal_are_two_pictures():
    first = record("\\xff.png", "caption", length="short", caption="a")
    second = record("\\xff.png", "caption", length="short", caption="b") | {"image_b64": "/y5wbmc="}
    assert [len(item.entries) for item in items([first, second])] == [1, 1]


def test_labels_have_the_colours_of_the_overlay(tmp_path: Path) -> None:
    """One that was asked for and never found has its place, and questions have none."""
    facts = {"image": "a.png", "width": 8, "height": 8, "error": None}
    box = {"x_min": 0.1, "y_min": 0.1, "x_max": 0.5, "y_max": 0.5, "score": 0.9}
    records = [
        {**facts, "id": "0", "task": "query", "prompt": "why?", "answer": "so"},
        {**facts, "id": "1", "task": "detect", "prompt": "car", "objects": []},
        {**facts, "id": "2", "task": "point", "prompt": "nose", "points": [{"label": "tip", "x": 0.5, "y": 0.5}]},
        {**facts, "id": "3", "task": "detect", "prompt": "dog", "objects": [{**box, "label": "dog"}]},
    ]
    stats, survey = RunStats(), Survey()
    for item in items(records):
        stats.add(item)
    for one in records:
        survey.add(one)
    assert list(stats.palette_labels) == survey.in_order() == ["car", "tip", "dog"]
    assert palette_of(stats.palette_labels).colour_of("dog") == "c2 d0"


def test_a_picture_that_a_sorted_selection_brings_twice_is_one_image():
    records = [record("a", "detect", "x", objects=[]), record("b", "detect", "x", objects=[])]
    stats = RunStats()
    for item in items([*records, record("a", "detect", "y", objects=[])]):
        stats.add(item)
    assert (stats.num_images, stats.num_records) == (2, 3)


def test_pictures_of_one_name_are_counted_by_what_is_in_them():
    """In any order; a record that does not know its picture's digest is about one that is counted."""
    known = [("a", "1"), ("a", "2"), ("a", "1"), ("b", None), ("b", "3"), ("c", "4"), ("c", None), ("b", None)]
    for order in (known, known[::-1]):
        stats = RunStats()
        for name, sha256 in order:
            for item in items([record(name, "detect", "x", objects=[]) | {"sha256": sha256}]):
                stats.add(item)
        assert (stats.num_images, stats.num_records) == (4, 8)


def test_names_are_not_written_over_one_another():
    """Boxes of one place, each in its record: below, inside, farther off; where all is taken the usual place."""
    box = (0.4, 0.4, 0.7, 0.7)
    names = ["star", "yellow star", "shape", "thing", "more", "and more", "fine", "much", "last"]
    (item,) = items(record("a", "detect", name, objects=[found(name, box)]) for name in names)
    top, bottom = 0.4 * item.frame[1], 0.7 * item.frame[1]
    heights = [entry.shapes[0].name_at[1] for entry in item.entries]
    near, far = [top - 3, bottom + 10, top + 10, bottom - 3], [top - 13, bottom + 20, top - 23, bottom + 30]
    assert heights == pytest.approx([*near, *far, top - 3])
    (alone,) = items([record("a", "detect", "x", objects=[found("x", box)])])
    assert alone.entries[0].shapes[0].name_at[1] == pytest.approx(top - 3)
