"""truth_rows: tables and the records' own columns as ground truth, whoever wrote them."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_manifests import write_manifests
from truths import box, points, record, write_records

from md3cli.errors import InputError, UsageError
from md3cli.evaluate import TABLE_SUFFIXES, evaluate, load_truth, truth_rows
from md3cli.evaluate.truth import Captions, Instances, Questions
from md3cli.exporters import ExportOptions, csv_flat
from md3cli.refine.collection import Collection


def table(folder, text, name="gt.csv"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def parquet(folder, rows, schema=None):
    path = folder / "gt.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


# ---- answers and captions -----------------------------------------------------------------------------

ROWS = [
    {"image": "a.jpg", "question": "How many?", "answer": ["3", "three"]},
    {"image": "b.jpg", "question": "How many?", "answer": ["4"]},
    {"image": "b.jpg", "question": "How many?", "answer": ["four"]},
    {"image": None, "question": "Two and two?", "answer": ["4"]},
]
EXPECTED = {
    ("a.jpg", "How many?"): ("3", "three"),
    ("b.jpg", "How many?"): ("4", "four"),
    (None, "Two and two?"): ("4",),
}


def test_the_same_rows_are_the_same_truth_in_every_format(tmp_path):
    lines = [",".join(['"' + (row["image"] or "") + '"', row["question"], _cell(row["answer"])]) for row in ROWS]
    comma = "image,question,answer\n" + "\n".join(lines) + "\n"
    files = [
        table(tmp_path, comma),
        table(tmp_path, "\ufeff" + comma.replace("\n", "\r\n"), "bom.csv"),
        table(tmp_path, "image\tquestion\tanswer\n" + "".join(_tsv(row) for row in ROWS), "gt.tsv"),
        parquet(tmp_path, ROWS),
        table(tmp_path, json.dumps(ROWS), "gt.json"),
    ]
    for path in files:
        truth = load_truth(path)
        assert isinstance(truth, Questions)
        assert truth.answers == EXPECTED
        assert truth.notes == ()


def _cell(texts):
    return '"' + json.dumps(texts).replace('"', '""') + '"'


def _tsv(row):
    return "\t".join([row["image"] or "", row["question"], _cell(row["answer"])]) + "\n"


def test_a_text_is_a_list_only_where_it_is_json(tmp_path):
    path = table(tmp_path, "image,question,answer\na,q,['x']\nb,q,[1]\nc,q,[\nd,q,\ne,q,[]\nf,q,{}\n")
    truth = load_truth(path)
    answers = {image: texts for (image, _), texts in truth.answers.items()}
    assert answers == {"a": ("['x']",), "b": ("1",), "c": ("[",), "f": ("{}",)}
    shown = str(path)
    assert truth.notes == (
        f"2 of 6 rows: no 'answer' in {shown}, so not scored",
        f"1 of 6 rows: 'answer' in {shown} looks like a list and is no JSON: a text",
    )


def test_captions_are_rows_too(tmp_path):
    text = 'image,caption\na.jpg,A dog\na.jpg,a brown dog\nb.jpg,"[""x"", ""y""]"\nc.jpg,\n'
    truth = load_truth(table(tmp_path, text))
    assert isinstance(truth, Captions)
    assert truth.captions == {"a.jpg": ("A dog", "a brown dog"), "b.jpg": ("x", "y")}
    assert truth.notes[0].startswith("1 of 4 rows: no 'caption'")
    assert load_truth(parquet(tmp_path, [{"image": "a", "caption": ["x", None, "y"]}])).captions == {"a": ("x", "y")}


def test_pictures_that_stand_in_the_table_go_by_their_names(tmp_path):
    rows = [{"image": {"bytes": b"x", "path": "dog.png"}, "question": "q", "answer": "yes"}]
    truth = load_truth(parquet(tmp_path, rows))
    assert truth.answers == {("0000001-dog.png", "q"): ("yes",)}


# ---- boxes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_boxes_are_rows_of_pixels(tmp_path, suffix):
    rows = [
        {"image": "a.jpg", "label": "car", "x": 1, "y": 2.5, "w": 3, "h": 4, "width": 200, "height": 100},
        {"image": "a.jpg", "label": "car", "x": 10, "y": 20, "w": 30, "h": 40, "width": 200, "height": 100},
        {"image": "b.jpg", "label": None, "x": None, "y": None, "w": None, "h": None, "width": None, "height": None},
    ]
    cells = "\n".join(",".join("" if value is None else str(value) for value in row.values()) for row in rows)
    path = parquet(tmp_path, rows) if suffix == "parquet" else table(tmp_path, ",".join(rows[0]) + f"\n{cells}\n")
    truth = load_truth(path)
    assert isinstance(truth, Instances)
    assert [thing.bbox for thing in truth.objects["a.jpg", "car"]] == [(1, 2.5, 3, 4), (10, 20, 30, 40)]
    assert truth.objects["a.jpg", "car"][0].mask is None
    assert list(truth.images) == ["a.jpg", "b.jpg"]
    assert (truth.images["a.jpg"].width, truth.images["b.jpg"].width) == (200, None)
    assert truth.categories == ("car",)


def test_what_md3_exports_is_a_perfect_truth_of_itself(tmp_path):
    names = ["a.jpg", "=1+1.jpg", "ü/–b.png"]
    found = [record(name, "detect", "@car", objects=[box(10 * n, 5, 40, 30)]) for n, name in enumerate(names, start=1)]
    found.append(record("empty.jpg", "detect", "@car", objects=[]))
    scores = _scores_of_own_export(tmp_path, [*found, record("failed.jpg", "detect", "@car", error="io")])
    assert scores["AP"] == scores["F1"] == 1.0
    answers = [
        record(name, "query", "How much?", answer=text) for name, text in zip(names, ["-5", "x", "ü"], strict=True)
    ]
    assert _scores_of_own_export(tmp_path, answers)["exact"] == 1.0
    captions = [record(name, "caption", length="short", caption=f"- {name}") for name in names]
    assert _scores_of_own_export(tmp_path, captions)["exact"] == 1.0


def _scores_of_own_export(folder, records):
    path = write_records(folder / "records.jsonl", records)
    csv_flat.export(Collection.of([path]), folder / "own.csv", ExportOptions(overwrite=True))
    (section,) = evaluate(path, [load_truth(folder / "own.csv")]).sections
    assert 3 in section.counts.values()
    return section.scores


# ---- what is refused ---------------------------------------------------------------------------------

BOXES = "image,label,x,y,w,h\n"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("image,question,answer\n", "has no rows"),
        ("", "is empty"),
        (
            "picture,question,answer\na,b,c\n",
            "no column 'image' but picture, question, answer; a table has the columns",
        ),
        ("image,text\na,b\n", "line 2: it has the columns image, text; a table has the columns image, question"),
        ("image,question,answer,caption\na,b,c,d\n", "answers and captions"),
        ("image,question,answer\na,,c\n", "line 2: no question"),
        ("image,question,answer\na,b\n", "line 2: 2 columns where the header has 3"),
        ("image,caption\n,b\n", "line 2: no image"),
        ("image,caption,caption\na,b,c\n", "names the column 'caption' twice"),
        (BOXES + "a,car,1,2,3,4\na,car,1,2,x,4\n", "line 3: w is 'x', not a number of pixels"),
        (BOXES + "a,car,1,2,nan,4\n", "w is 'nan'"),
        (BOXES + "a,car,1,2,1e300,4\n", "w is '1e300'"),
        (BOXES + "a,car,1,2,0,4\n", "a box of 0 x 4 pixels"),
        (BOXES + "a,car,,,,\n", "x is '', not a number"),
        (BOXES + "a,,1,2,3,4\n", "a box without a label"),
        ("image,label,x,y,w,h,width\na,car,1,2,3,4,2.5\n", "width is 2.5, not a number of pixels"),
        ("image,task,answer,prompt\na,point,b,c\n", "a row of the task 'point'"),
        (
            "image,task,prompt,answer,caption\na,query,b,c,\na,caption,,,d\n",
            "line 3: captions among answers; a ground truth is of one kind",
        ),
        (b"\xff\xfei\0m\0", "UTF-16"),
        (b"image,caption\na,\xff\n", "line 2: not valid UTF-8"),
        (b"PK\x03\x04", "a spreadsheet"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused_by_its_row(tmp_path, text, why):
    with pytest.raises(InputError) as caught:
        load_truth(table(tmp_path, text))
    assert why in str(caught.value)
    assert "gt.csv" in str(caught.value)
    assert "--map" not in str(caught.value)


def test_parquet_that_makes_no_sense_is_refused(tmp_path):
    with pytest.raises(InputError, match="no column 'image' but picture"):
        load_truth(parquet(tmp_path, [{"picture": "a", "answer": "b"}]))
    columns = {"image": pa.string(), "question": pa.string(), "answer": pa.struct([("x", pa.int64())])}
    rows = [{"image": "a", "question": "q", "answer": None}, {"image": "a", "question": "q", "answer": {"x": 1}}]
    path = parquet(tmp_path, rows, pa.schema(columns))
    with pytest.raises(InputError, match="row 2: an object is no true answer"):
        load_truth(path)
    (tmp_path / "gt.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(InputError, match="as Parquet"):
        load_truth(tmp_path / "gt.parquet")


def test_manifests_in_every_state_are_refused_in_words(tmp_path):
    tables = [one.name for one in write_manifests(tmp_path) if one.name.endswith(TABLE_SUFFIXES)]
    assert len(tables) > 20
    for name in tables:
        with pytest.raises(InputError) as caught:
            load_truth(tmp_path / name)
        assert name in str(caught.value)
        assert "--map" not in str(caught.value)


def test_what_is_not_a_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_truth(tmp_path / "gt.csv")
    (tmp_path / "gt.csv").mkdir()
    with pytest.raises(InputError, match="not a regular file"):
        load_truth(tmp_path / "gt.csv")


def test_what_is_kept_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(truth_rows, "MOST_CHARS", 3000)
    assert load_truth(table(tmp_path, "image,caption\n" + "a,b\n" * 20)).captions["a"] == ("b",) * 20
    with pytest.raises(InputError, match="more than 3,000 characters until here"):
        load_truth(table(tmp_path, "image,caption\n" + "a,b\n" * 40))
    with pytest.raises(InputError, match="more than 3,000 characters until here"):
        load_truth(parquet(tmp_path, [{"image": "a", "caption": ["x" * 200] * 20}]))
    with pytest.raises(InputError, match="more than 3,000 characters until here"):
        load_truth(parquet(tmp_path, [{"image": "a", "caption": [{"answer": "x" * 200}] * 20}]))


def test_what_is_true_of_one_thing_is_bounded(tmp_path):
    with pytest.raises(InputError, match="line 2: 10,001 true answers"):
        load_truth(table(tmp_path, 'image,caption\na,"[' + "1," * 10_000 + '1]"\n'))


def test_a_list_that_is_nested_too_deep_is_a_text(tmp_path):
    deep = "[" * 100_000
    assert load_truth(table(tmp_path, f"image,caption\na,{deep}\n")).captions["a"] == (deep,)


# ---- the records' own columns --------------------------------------------------------------------------


def own(folder, records, column="answer"):
    path = write_records(folder / "records.jsonl", records)
    return evaluate(path, [], answer=column).sections


def query(image, said, prompt="Q?", **meta):
    return record(image, "query", prompt, answer=said) | {"meta": meta}


def test_the_true_answer_stands_in_the_records_row(tmp_path):
    records = [
        query("a.jpg", "3", answer="three"),
        query("b.jpg", "4", answer=["5", "4"]),
        query("c.jpg", "yes", answer=True),
        query("d.jpg", "2", answer='["1", "2"]'),
        query(None, "4", "Two and two?", answer=4),
    ]
    (section,) = own(tmp_path, records)
    assert section.counts == {"requests": 5, "failed": 0, "not_in_truth": 0, "not_asked": 0}
    assert (section.scores["exact"], section.scores["normalised"]) == (0.8, 1.0)


def test_rows_of_one_picture_and_question_are_told_apart_by_the_question(tmp_path):
    records = [query("a.jpg", "1", f"Q{n}?", answer=str(n)) for n in range(3)]
    assert own(tmp_path, records)[0].scores["exact"] == pytest.approx(1 / 3)


def test_records_without_an_answer_are_counted_and_told(tmp_path):
    records = [query("a.jpg", "3", answer="3"), query("b.jpg", "3", answer=" "), query("c.jpg", "3", answer=None)]
    records += [query("d.jpg", "3"), query("e.jpg", "3", answer=[])]
    (section,) = own(tmp_path, records)
    assert (section.counts["requests"], section.counts["not_in_truth"]) == (1, 4)
    assert "4 of 5 queries: no 'answer' in meta, so not scored" in section.notes


def test_captions_are_compared_where_no_query_is(tmp_path):
    captions = [record("a.jpg", "caption", caption="A dog") | {"meta": {"answer": ["a dog", "one dog"]}}]
    (section,) = own(tmp_path, captions)
    assert (section.name, section.scores["exact"]) == ("captions (normal)", 1.0)
    lengths = [one | {"length": length, "id": length} for length in ("short", "long") for one in captions]
    lengths.append(record(None, "caption", error="bad_row") | {"meta": {"answer": "a dog"}})
    assert [section.counts["references"] for section in own(tmp_path, lengths)] == [2, 2]
    (section,) = own(tmp_path, [*captions, query("a.jpg", "3", answer="3")])
    assert section.name == "answers"
    assert "--answer is about the queries here; --task caption has the captions compared with it" in section.notes


@pytest.mark.parametrize(
    ("column", "why"),
    [
        ("anwser", "no record has this column in its meta; did you mean answer?"),
        ("meta.answer", "did you mean answer?"),
        ("zebra", "there are: answer, size"),
        ("size", "is empty in the meta of all queries (1)"),
    ],
)
def test_a_column_that_is_not_there_is_refused_with_a_hint(tmp_path, column, why):
    with pytest.raises(UsageError) as caught:
        own(tmp_path, [query("a.jpg", "3", answer="3", size=None)], column)
    assert why in str(caught.value)


def test_what_is_no_answer_or_of_no_query_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"meta\.answer of a\.jpg: an object is no true answer"):
        own(tmp_path, [query("a.jpg", "3", answer={"x": 1})])
    with pytest.raises(UsageError, match="here are records of point"):
        own(tmp_path, [record("a.jpg", "point", "car", points=points((9, 9))) | {"meta": {"answer": "3"}}])


THING = {"label": "cat", "x_min": 0.1, "y_min": 0.2, "x_max": 0.3, "y_max": 0.7}
OWN = {"image": "a.png", "width": 100, "height": 50, "task": "detect", "prompt": "cat"}
FULL = {"id": "1", "finish_reason": "stop", "error_type": None}  # what all tables of md3 have


def test_md3s_own_parquet_has_its_boxes(tmp_path):
    segment = {"label": "dog", "svg_path": "", "bbox": {key: THING[key] for key in THING if key != "label"}}
    rows = [OWN | {"objects": [THING], "segments": None}, OWN | {"task": "segment", "segments": [segment, segment]}]
    truth = load_truth(parquet(tmp_path, [*rows, OWN | {"image": "b.png", "objects": []}]))
    assert [*truth.images] == ["a.png", "b.png"]
    assert {key: len(found) for key, found in truth.objects.items()} == {("a.png", "cat"): 1, ("a.png", "dog"): 2}
    for found in truth.objects.values():
        assert found[0].bbox == pytest.approx((10, 10, 20, 25))


@pytest.mark.parametrize(
    ("columns", "name"),
    [(FULL, "a/b.png"), ({"task": "detect"}, "0000001-b.png")],
)
def test_pictures_in_a_table_are_called_as_in_the_records(tmp_path, columns, name):
    picture = {"image": {"bytes": b"x", "path": "a/b.png"}, "objects": [THING]}  # as --embed-images writes it
    assert [*load_truth(parquet(tmp_path, [OWN | columns | picture])).images] == [name]


@pytest.mark.parametrize("folder", ["", "data/gt.parquet/"])
def test_a_run_over_md3s_own_table_is_scored_by_it(tmp_path, folder):
    """Such a run calls pictures after rows, of which one picture may have several."""
    asked = [("a/p.png", "cat", [THING]), ("a/p.png", "dog", []), ("b/p.png", "cat", [THING])]
    rows = [
        OWN | FULL | {"image": {"bytes": b"x", "path": path}, "prompt": prompt, "objects": objects}
        for path, prompt, objects in asked
    ]
    found = [THING | {"score": 0.9}]
    records = [record(f"{folder}{number:07d}-p.png", "detect", "cat", objects=found) for number in (1, 2, 3)]
    path = write_records(tmp_path / "records.jsonl", records)
    (section,) = evaluate(path, [load_truth(parquet(tmp_path, rows))]).sections
    assert (section.scores["precision"], section.scores["recall"], section.counts["images"]) == (1, 1, 2)
    assert section.verdicts.keys() == {records[0]["id"], records[2]["id"]}


@pytest.mark.parametrize("order", [1, -1])
def test_rows_of_another_parquet_file_are_no_rows_of_the_truth(tmp_path, order):
    """`datasets` often keeps no names, so that rows of all files of a folder are called the same."""
    truth = parquet(tmp_path, [{"image": {"bytes": b"x", "path": None}, "question": "Who?", "answer": "me"}])
    answers = {"other.parquet": "you", "gt.parquet": "me"}
    records = [record(f"{name}/0000001", "query", "Who?", answer=answer) for name, answer in answers.items()]
    path = write_records(tmp_path / "records.jsonl", records[::order])
    (section,) = evaluate(path, [load_truth(truth)]).sections
    assert {record: verdict.is_right for record, verdict in section.verdicts.items()} == {records[1]["id"]: True}


def test_md3s_own_table_of_two_tasks_is_refused_with_a_hint(tmp_path):
    own = OWN | FULL | {"objects": [THING], "answer": None}
    rows = [own, own | {"task": "query", "prompt": "How many?", "answer": "1"}]
    with pytest.raises(InputError, match=r"answers among boxes; .* \(md3 export --task TASK writes one\)"):
        load_truth(parquet(tmp_path, rows))


def test_a_picture_that_could_not_be_put_in_a_table_is_told(tmp_path):
    own = OWN | FULL | {"objects": [THING]}
    rows = [own | {"image": {"bytes": b"x", "path": "a.png"}}, own | {"image": None}]
    failed = own | {"image": None, "error_type": "decode"}
    truth = load_truth(parquet(tmp_path, [*rows, failed]))
    assert [*truth.images] == ["a.png"]
    told = " ".join(truth.notes)
    assert "requests that failed, which are no truth: 1" in told
    assert "without their picture and its name, which are no truth: 1" in told
    caption = FULL | {"task": "caption", "caption": "a", "image": None}
    assert "no truth: 1" in " ".join(load_truth(parquet(tmp_path, [caption])).notes)
    with pytest.raises(InputError, match="row 1: no image"):
        load_truth(parquet(tmp_path, [{"image": None, "caption": "a"}]))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (OWN, "it has no boxes"),
        (OWN | {"width": None, "objects": [THING]}, "without width and height"),
        (OWN | {"objects": [THING | {"label": ""}]}, "no label or no box"),
        (OWN | {"objects": [THING | {"x_max": 0.1}]}, "a box of 0 x 25 pixels"),
        (OWN | {"objects": [{"label": "cat"}]}, "x_min is 'None', not a number"),
        (OWN | {"objects": "cat"}, "objects holds no list"),
        (OWN | {"segments": [{"label": "cat", "bbox": "x"}]}, "no label or no box"),
    ],
)
def test_lists_of_objects_that_make_no_sense_are_refused(tmp_path, row, words):
    with pytest.raises(InputError, match=words):
        load_truth(parquet(tmp_path, [row]))
