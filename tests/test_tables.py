"""People's tables: what is written in a cell is what is read, whatever the format; splits, labels, lists, odd files.

Expected values are what a person reads in the cell. Images are one pixel high and tell by their colour which they are.
"""

import datetime
import decimal
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import hub_server
import pytest
from PIL import Image
from test_data import DataHandler, opened, read, refused

from comp_cli.cli.exit_codes import REFUSED, USAGE
from comp_cli.cli.output import Output
from comp_cli.data.cells import BadRow, as_text, read_answers, read_texts, written
from comp_cli.data.pictures import Hub, read_content
from comp_cli.data.rows import Columns, FoundColumns, read_row
from comp_cli.data.splits import kind_of
from comp_cli.data.tables import BROKEN, read_files

COUNT = 24
PURPOSES = ("calibration", "evaluation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """0.png to 23.png; tables of tests have names of their own."""
    folder = tmp_path_factory.mktemp("tables")
    for number in range(COUNT):
        Image.new("RGB", (6, 4), (10 * number, 200, 50)).save(folder / f"{number}.png")
    return folder


def table(path: Path, cells: dict[str, list[str]]) -> Path:
    """A table of cells as they are written: in JSON a cell is JSON, in CSV it is quoted where it must be."""
    rows = [{"image": f"{n}.png"} | {name: column[n % len(column)] for name, column in cells.items()} for n in range(COUNT)]
    if path.suffix == ".jsonl":
        said = [", ".join([f'"image": "{row.pop("image")}"', *(f'"{k}": {v}' for k, v in row.items())]) for row in rows]
        path.write_text("".join(f"{{{line}}}\n" for line in said))
    else:
        quoted = [['"' + cell.replace('"', '""') + '"' for cell in row.values()] for row in rows]
        path.write_text("\n".join([",".join(rows[0]), *map(",".join, quoted)]) + "\n")
    return path


def whole(data, **options):
    """All pairs of a table, by text."""
    return sorted((pair for purpose in PURPOSES for pair in read(data, purpose, **options)), key=lambda pair: pair.text)


# Cells ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cell", ["true", "FALSE", "007", "1.0", "1e-5", "123456789012345678901", "2020-01-01", "None", "NA", "nan"]
)
def test_a_csv_cell_stays_the_string_that_it_is(folder, cell):
    pairs = whole(table(folder / "cells.csv", {"text": [cell], "answer": [cell]}))
    assert {(pair.text, pair.answers) for pair in pairs} == {(cell, (cell,))} and len(pairs) == COUNT


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ("true", "true"),
        ("false", "false"),
        ("3", "3"),
        ("3.0", "3.0"),
        ("1e-5", "1e-5"),
        ("123456789012345678901", "123456789012345678901"),
        ('"007"', "007"),
        ('"2020-01-01"', "2020-01-01"),
        ('"2020-01-01T00:00:00"', "2020-01-01T00:00:00"),
        ('"None"', "None"),
    ],
)
def test_a_json_value_stays_as_it_is_written(folder, cell, text):
    """Also beside values of other kinds, which `datasets` would make one kind of."""
    pairs = whole(table(folder / "cells.jsonl", {"text": [cell, '"other"'], "answer": [cell, "[0.5, null]"]}))
    assert {(pair.text, pair.answers) for pair in pairs} == {(text, (text,)), ("other", ("0.5",))}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        (7, "7"),
        (3.0, "3"),
        (1234567.5, "1234567.5"),
        (decimal.Decimal("1.50"), "1.50"),
        (datetime.date(2020, 1, 2), "2020-01-02"),
        (" a ", "a"),
        (float("nan"), None),
        (None, None),
        ("  ", None),
        (b"a", None),
        ({"a": 1}, None),
    ],
)
def test_values_of_typed_columns_as_texts(value, text):
    assert as_text(value) == text
    assert read_answers(value) == (() if text is None else (text,))


def test_parquet_columns_of_numbers_and_truth_values(folder):
    columns = {
        "image": [f"{n}.png" for n in range(COUNT)],
        "text": list(range(COUNT)),
        "answer": [n % 2 == 0 for n in range(COUNT)],
    }
    datasets.Dataset.from_dict(columns).to_parquet(folder / "typed.parquet")
    pairs = whole(folder / "typed.parquet")
    assert {pair.text: pair.answer for pair in pairs} == {str(n): "true" if n % 2 == 0 else "false" for n in range(COUNT)}


@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
def test_numbers_of_fewer_bits_stay_what_they_were(folder, kind):
    """Python makes 0.10000000149011612 of the 0.1 of a float32."""
    columns = {"image": [f"{n}.png" for n in range(COUNT)], "question": ["how much"] * COUNT, "answer": [0.1, 2.0, None] * 8}
    made = datasets.Dataset.from_dict(columns).cast_column("answer", datasets.Value(kind))
    made.to_parquet(folder / "short.parquet")
    assert {pair.answers for pair in whole(folder / "short.parquet")} == {("0.1",), ("2",), ()}
    lists = datasets.Dataset.from_dict(columns | {"answer": [[0.1, None, 2.0]] * COUNT})
    lists.cast_column("answer", datasets.List(datasets.Value(kind))).to_parquet(folder / "short.parquet")
    assert {pair.answers for pair in whole(folder / "short.parquet")} == {("0.1", "2")}


@pytest.mark.parametrize(
    "text", ["[a dog]", "[1, 2]", "[0, 1)", "{a dog}", "a [b]", "[removed]", "[5]", "[true, false]", "[[0, 0], [4, 4]]"]
)
def test_words_in_brackets_are_no_list(text):
    assert written(text) == text and read_texts(text) == [text] and read_answers(text) == (text,)


@pytest.mark.parametrize(
    "cell",
    [
        '["a dog", "it\'s"]',
        """['a dog', "it's"]""",
        """('a dog', "it's")""",
        '[["a dog"], ["it\'s"]]',
        ' [ "a dog" , null, "", "it\'s" ]\n',
    ],
)
def test_a_list_that_is_written_as_a_text_is_a_list(folder, cell):
    assert read_texts(cell) == ["a dog", "it's"]
    assert read_answers(cell) == ("a dog", "it's")
    pairs = whole(table(folder / "lists.csv", {"text": [cell]}), out=(out := Output("quiet")))
    assert len(pairs) == 2 * COUNT and {pair.text for pair in pairs} == {"a dog", "it's"}
    assert not out.warnings


@pytest.mark.parametrize("cell", ['["two", 2, true, 0.5]', '[2, "two"]', "['two', 2]"])
def test_a_list_of_texts_and_numbers_is_a_list(cell):
    """As people answer: one writes a word, the next one a number."""
    texts = [part.strip("\"' ") for part in cell[1:-1].split(",")]
    assert read_texts(cell) == texts and read_answers(cell) == tuple(texts)


@pytest.mark.parametrize("cell", ["('a dog')", '("Untitled", 1959)', '("a" "b")', "('tis a dog)", "(a, b)"])
def test_words_in_parentheses_are_no_list(cell):
    assert read_texts(cell) == [cell]


@pytest.mark.parametrize("cell", ["['a dog' 'a cat']", "['a dog'\n 'a cat']", '["a dog", "a', '["a" b]', "['a', f('b')]"])
def test_what_begins_as_a_list_and_is_none_is_a_bad_row(cell):
    """NumPy prints arrays without commas, and Python would read two strings as one. Nothing is ever run."""
    if cell.endswith("]"):
        with pytest.raises(BadRow, match="list"):
            read_texts(cell)
    else:
        assert read_texts(cell) == [cell]


@pytest.mark.parametrize("cell", ['[{"answer": "yes", "n": 1}, {"answer": 3.0}]', "[{'answer': 'yes'}, {'answer': '3.0'}]"])
def test_answers_of_several_people_written_as_a_text(cell):
    assert read_answers(cell) == ("yes", "3.0")
    assert read_answers('{"answer": "yes"}') == ("yes",)


def test_half_of_a_surrogate_pair_is_no_text(folder):
    """JSON can write it, and no tokenizer takes it."""
    assert "no Unicode" in refused(REFUSED, table(folder / "half.jsonl", {"text": ['"\\ud800 a"']})).message


# Splits --------------------------------------------------------------------------------------------------------------

KARPATHY = ["train", "restval", "val", "test"]


def splits_of(path, **options):
    """Which splits calibration and evaluation read, by the texts, which are the names of the splits."""
    return [sorted({pair.text for pair in read(path, purpose, **options)}) for purpose in PURPOSES]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_split_column_is_honoured(folder, suffix):
    path = folder / f"karpathy{suffix}"
    if suffix == ".parquet":
        names = [KARPATHY[n % 4] for n in range(COUNT)]
        made = datasets.Dataset.from_dict({"image": [f"{n}.png" for n in range(COUNT)], "text": names, "split": names})
        made.cast_column("split", datasets.ClassLabel(names=KARPATHY)).to_parquet(path)
    else:
        said = KARPATHY if suffix == ".csv" else [f'"{name}"' for name in KARPATHY]
        table(path, {"text": said, "split": said})
    assert splits_of(path) == [["restval", "train"], ["val"]]
    assert splits_of(path, split="restval") == [["restval"], ["val"]]
    assert splits_of(path, split="val") == [["val"], ["test"]]
    assert splits_of(path, split="validation") == [["val"], ["test"]]
    assert "never calibrates" in refused(USAGE, path, split="test").message
    assert "train, validation, test" in refused(USAGE, path, split="nothing").hint


def test_what_other_splits_hold_is_counted(folder, capsys):
    path = table(folder / "counted.csv", {"text": ["a"], "split": ["Train", "TEST", "", "nan", "extra", "dev"]})
    pairs = opened(path, out=(out := Output("human")))
    out.say = (said := []).append
    assert len(list(pairs.read("calibration", 10))) == 4
    counts = pairs.counts()["calibration"]
    left_out = {"of split test": 4, "without a split": 8, "of split extra": 4, "of split dev": 4}
    assert counts == {"asked": 10, "pairs": 4, "rows": COUNT, "bad_rows": {}, "left_out": left_out}
    line = next(line for line in said if line.startswith("calibration: "))
    assert line.startswith("calibration: 4 pairs (10 were asked for) of 24 rows; left out: ") and "4 of split test" in line
    assert "splits from split" in capsys.readouterr().err


def test_test_rows_never_calibrate_whatever_the_order(folder):
    path = table(
        folder / "late.csv", {"text": ["train"] * (COUNT - 1) + ["test"], "set": ["train"] * (COUNT - 1) + ["test_dev"]}
    )
    assert splits_of(path) == [["train"], ["test"]]
    path = table(folder / "only.csv", {"text": ["a"], "split": ["test"]})
    assert "never calibrates" in refused(REFUSED, path).message


@pytest.mark.parametrize("name", ["set", "subset", "fold", "partition", "phase"])
def test_siblings_of_a_split_column_must_hold_splits(folder, name):
    path = table(folder / "sibling.csv", {"text": ["train", "val"], name: ["train", "val"]})
    assert splits_of(path) == [["train"], ["val"]]
    path = table(folder / "no_sibling.csv", {"text": ["a"], name: ["train", "blue"]})
    out = Output("human")
    out.say = (said := []).append
    assert len(whole(path, out=out)) == COUNT
    assert any(f"column {name} names no splits" in line for line in said)


def test_a_split_column_of_something_else(folder):
    path = table(folder / "thirds.csv", {"text": ["0", "1", "2"], "split": ["0", "1", "2"]})
    error = refused(USAGE, path)
    assert "no split called train" in error.message and "--split-column ''" in error.hint
    assert splits_of(path, split="1")[0] == ["1"]
    assert len(whole(path, columns=Columns(split=""))) == COUNT
    assert splits_of(
        table(folder / "named.csv", {"text": ["train", "val"], "part": ["train", "val"]}), columns=Columns(split="part")
    )
    assert "no column 'part'" in refused(USAGE, path, columns=Columns(split="part")).message


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("Usage", ["Training", "PrivateTest"]),
        ("mode", ["train", "test"]),
        ("is_test", ["0", "1"]),
        ("isTest", ["false", "True"]),
        ("is_train", ["yes", "no"]),
        ("is_val", ["0", "1"]),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_column_that_names_splits_is_honoured_whatever_its_name(folder, name, values, suffix):
    path = table(folder / "any_name.csv", {"text": ["first", "second"], name: values})
    if suffix == ".parquet":
        path = path.with_suffix(suffix)
        cells = {"text": ["first", "second"] * (COUNT // 2), name: values * (COUNT // 2)}
        made = datasets.Dataset.from_dict({"image": [f"{n}.png" for n in range(COUNT)]} | cells)
        made.cast_column(name, datasets.Value("large_string")).to_parquet(path)  # as polars writes it
    assert splits_of(path) == [["first"], ["second"]]
    assert len(whole(path, columns=Columns(split=""))) == COUNT


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("mode", ["train"]),
        ("mode", ["train", "blue"]),
        ("is_red", ["0", "1"]),
        ("is_valid", ["0", "1"]),
        ("title", ["test drive", "train"]),
    ],
)
def test_a_column_that_says_something_else_makes_no_splits(folder, name, values):
    assert len(whole(table(folder / "no_splits.csv", {"text": ["a"], name: values}))) == COUNT


def test_a_column_of_which_only_some_values_are_splits_is_asked_about_where_it_may_hold_test_data(folder):
    path = table(folder / "some.csv", {"text": ["a"], "subset": ["train", "test", "unused"]})
    assert "--split-column subset" in refused(USAGE, path).hint
    assert len(whole(path, columns=Columns(split=""))) == COUNT


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_folders_of_images_are_splits_where_nothing_else_names_any(folder, tmp_path, suffix):
    """An imagefolder with one metadata file for all, as `datasets` reads it too."""
    names = ["test" if n % 3 == 0 else "train" for n in range(COUNT)]
    for number, split in enumerate(names):
        (tmp_path / split).mkdir(exist_ok=True)
        os.link(folder / f"{number}.png", tmp_path / split / f"{number}.png")
    records = [{"file_name": f"{split}/{n}.png", "text": split} for n, split in enumerate(names)]
    if suffix == ".csv":
        lines = ["file_name,text", *(",".join(record.values()) for record in records)]
    else:
        lines = list(map(json.dumps, records))
    (tmp_path / f"metadata{suffix}").write_text("\n".join(lines) + "\n")
    assert splits_of(tmp_path) == [["train"], ["test"]]
    (tmp_path / f"metadata{suffix}").rename(tmp_path / f"train{suffix}")
    assert splits_of(tmp_path / f"train{suffix}") == [["test", "train"], ["test", "train"]]


def test_a_split_column_that_is_not_there_is_refused_beside_splits_of_files(folder, tmp_path):
    for name in ("train.csv", "val.csv"):
        table(tmp_path / name, {"text": ["a"]})
    assert "no column 'part'" in refused(USAGE, tmp_path, columns=Columns(split="part")).message


def test_a_row_that_contradicts_the_split_of_its_file_is_left_out(folder, tmp_path):
    for number in range(COUNT):
        os.link(folder / f"{number}.png", tmp_path / f"{number}.png")
    table(tmp_path / "train.csv", {"text": ["train", "test"], "split": ["train", "test"]})
    (tmp_path / "val.csv").write_text("image,text,split\n0.png,val,val\n1.png,test,test\n2.png,train,train\n")
    assert splits_of(tmp_path) == [["train"], ["test", "val"]]


def test_kinds_of_splits_by_their_words():
    found = {
        name: kind_of(name) for name in ("train2014", "restval", "val_unseen", "Dev", "test-dev", "testB", "eval", "extra")
    }
    train, validation, test = "train", "validation", "test"
    assert list(found.values()) == [train, train, validation, validation, test, test, test, None]


def test_tables_that_are_not_read_beside_those_of_splits_are_named(folder, tmp_path):
    for number in range(COUNT):
        os.link(folder / f"{number}.png", tmp_path / f"{number}.png")
    for name in ("train.csv", "more.csv"):
        table(tmp_path / name, {"text": [name]})
    pairs = whole(tmp_path, out=(out := Output("quiet")))
    assert {pair.text for pair in pairs} == {"train.csv"} and len(pairs) == COUNT
    assert all("not read" in said and said.endswith(": more.csv.") for said in out.warnings) and out.warnings


def test_what_map_and_filter_leave_in_a_saved_data_set_is_not_read(folder, tmp_path):
    """`datasets` keeps their results in the folder that it loaded: the same rows again, changed."""
    rows = {"image": [str(folder / f"{n}.png") for n in range(COUNT)], "text": [f"as saved {n}" for n in range(COUNT)]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    saved = datasets.load_from_disk(str(tmp_path / "saved"))
    saved.map(lambda row: {"text": "changed"}).filter(lambda row: False)
    saved.filter(lambda row: row["text"] < "as saved 3")
    assert list((tmp_path / "saved").glob("cache-*.arrow"))
    assert [pair.text for pair in whole(tmp_path / "saved")] == sorted(rows["text"])


# Labels --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [["0", "1"], ["positive", "negative"], ["yes", "no"], ["True"], ["1.0", "0.0"]])
@pytest.mark.parametrize("name", ["label", "labels", "Label"])
def test_a_column_label_is_asked_about_before_it_is_taken(folder, values, name):
    """Hateful or not, positive or negative: labels of many things."""
    path = table(folder / "label.csv", {"text": ["a"], name: values})
    error = refused(USAGE, path)
    assert f"does the column '{name}'" in error.message and f"--label-column {name}." in error.hint
    assert {pair.label for pair in whole(path, columns=Columns(label=name))} <= {0, 1}
    assert {pair.label for pair in whole(path, columns=Columns(label=""))} == {None}


def test_words_that_say_match_are_certain(folder):
    path = table(folder / "certain.csv", {"text": ["a"], "label": ["match", "mismatch"]})
    assert {pair.label for pair in whole(path)} == {0, 1}


def test_a_late_row_that_is_no_label_is_a_counted_bad_row(folder):
    path = table(folder / "late_label.csv", {"text": ["a"], "is_match": ["1", "0"] * 10 + ["cat"] * 4})
    out = Output("quiet")
    pairs = whole(path, out=out)
    assert len(pairs) == 20 and {pair.label for pair in pairs} == {0, 1}
    assert all("no match or mismatch as label" in warning for warning in out.warnings) and out.warnings
    path = table(folder / "sports.csv", {"text": ["a"], "match": ["England - Wales"]})
    assert "no match or mismatch as label" in refused(REFUSED, path).message


def test_a_column_that_begins_in_a_late_row_is_a_column(tmp_path):
    """The first thousand rows of a JSON text do not have it."""
    rows = [{"image": "no.png", "text": "a"} | ({"match": number % 2} if number >= 1_500 else {}) for number in range(2_000)]
    (tmp_path / "late.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "as label" in refused(REFUSED, tmp_path / "late.jsonl").message


def test_a_name_that_says_match_goes_before_label(folder):
    path = table(folder / "both.csv", {"text": ["a"], "label": ["cat", "dog"], "match": ["1", "0"]})
    assert {pair.label for pair in whole(path)} == {0, 1}


def test_mismatches_that_a_task_has_no_use_for_are_counted(folder):
    from comp_cli.tasks import TASKS

    path = table(folder / "mismatches.csv", {"text": ["a"], "match": ["1", "0", "0"]})
    pairs = opened(path, out=(out := Output("quiet")))
    found = list(pairs.read("calibration", 100, 0, TASKS["retrieval"].accepts))
    left_out = pairs.counts()["calibration"]["left_out"]["labelled as mismatches"]
    assert f"{left_out} of {left_out + len(found)} pairs are labelled as mismatches and are not used" in out.warnings[0]


def test_bad_rows_among_mismatches_do_not_end_the_reading(folder):
    """Fewer pairs are said to be there only where fewer are there: here one row in three is bad, and one makes a pair."""
    from comp_cli.tasks import TASKS

    path = table(folder / "few.csv", {"text": ["a", "a", ""], "match": ["1", "0", "1"]})
    pairs = opened(path)
    assert len(list(pairs.read("calibration", 4, 0, TASKS["retrieval"].accepts))) == 4


# One image -----------------------------------------------------------------------------------------------------------


def test_one_image_under_many_paths_is_one_image(folder, tmp_path):
    """Relative and absolute, through a link, around a corner, copied, and as bytes: one number, and one purpose."""
    (tmp_path / "sub").mkdir()
    rows = []
    for number in range(COUNT):
        content = (folder / f"{number}.png").read_bytes()
        (tmp_path / f"{number}.png").write_bytes(content)
        (tmp_path / f"copy{number}.PNG").write_bytes(content)
        os.symlink(tmp_path / f"{number}.png", tmp_path / f"link{number}.png")
        names = [
            f"{number}.png",
            f"./sub/../{number}.png",
            str(tmp_path / f"{number}.png"),
            f"link{number}.png",
            f"copy{number}.PNG",
        ]
        rows += [{"image": name, "text": str(number)} for name in names]
    path = tmp_path / "paths.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = [{pair.text: pair.image_id for pair in read(path, purpose)} for purpose in PURPOSES]
    assert not set(found[0]) & set(found[1]) and len(found[0] | found[1]) == COUNT
    assert len({pair.image_id for pair in whole(path)}) == COUNT
    columns = FoundColumns("image", "text")
    (stored,) = read_row({"image": {"bytes": content, "path": "elsewhere.png"}, "text": "a"}, columns, None)
    assert stored.image_id == (found[0] | found[1])[str(COUNT - 1)]


def test_an_image_in_two_splits_does_not_serve_both(folder, tmp_path):
    for number in range(4):
        os.link(folder / f"{number}.png", tmp_path / f"{number}.png")
    (tmp_path / "train.csv").write_text("image,text\n0.png,0\n1.png,1\n")
    (tmp_path / "val.csv").write_text("image,text\n1.png,1\n2.png,2\n")
    pairs = opened(tmp_path)
    assert sorted(pair.text for pair in pairs.read("calibration", 10)) == ["0", "1"]
    assert [pair.text for pair in pairs.read("evaluation", 10)] == ["2"]
    assert pairs.counts()["evaluation"]["left_out"] == {"with an image that calibration has seen": 1}


# Odd files -----------------------------------------------------------------------------------------------------------

LINES = [f"{n}.png,ä {n}" for n in range(COUNT)]
READ = {
    "bom.csv": "\ufeff" + "\n".join(["image,text", *LINES]),
    "crlf.csv": "\r\n".join(["image,text", *LINES]),
    "semicolon.csv": "\n".join(["image;text", *LINES]).replace(",", ";"),
    "tab.csv": "\n".join(["image\ttext", *LINES]).replace(",", "\t"),
    "excel.csv": "sep=;\n" + "\n".join(["image;text", *LINES]).replace(",", ";"),
    "spaces.csv": "\n".join([" image , text", *LINES]).replace(",", ", "),
    "blank.csv": "\n\n".join(["image,text,,", *(line + ",," for line in LINES)]),
    "columns.json": json.dumps({"image": [f"{n}.png" for n in range(COUNT)], "text": [f"ä {n}" for n in range(COUNT)]}),
    "lines.json": "\n".join(json.dumps({"image": f"{n}.png", "text": f"ä {n}"}) for n in range(COUNT)),
    "late.jsonl": "\n".join(
        json.dumps({"text": f"ä {n}", "image": f"{n}.png"} | ({"n": 1} if n else {})) for n in range(COUNT)
    ),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("name", READ)
def test_files_as_programs_write_them(folder, name, encoding):
    if encoding == "utf-16" and READ[name].startswith("\ufeff"):
        return
    (folder / name).write_bytes(READ[name].encode(encoding))
    assert sorted(pair.text for pair in whole(folder / name)) == sorted(f"ä {n}" for n in range(COUNT))


GOOD = "\n".join(f'{{"image": "{n}.png", "text": "a"}}' for n in range(COUNT)) + "\n"
GOOD_CSV = "image,text\n" + "\n".join(f"{n}.png,a" for n in range(COUNT)) + "\n"
BAD_LINES = {
    "deep.jsonl": GOOD + '{"image": "0.png", "text": ' + "[" * 100_000 + "\n",
    "cut.jsonl": GOOD + '{"image": "0.png", "te',
    "wide.jsonl": GOOD + '{"image": "0.png", "text": "' + "x" * 2**24 + '"}\n',
    "nul.jsonl": GOOD + '{"image": "0.png", "text": "a\0b"}\n',
    "list.jsonl": GOOD + "[1]\n",
    "twice.jsonl": GOOD + '{"image": "0.png", "text": "a", "text": "b"}\n',
    "more.csv": GOOD_CSV + "0.png,a,b\n",
    "fewer.csv": GOOD_CSV + "0.png\n",
    "quoted.csv": GOOD_CSV + '0.png,"a "b" c"\n',
    "nul.csv": GOOD_CSV + "0.png,a\0b\n",
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_line_that_cannot_be_read_is_a_counted_bad_row(folder, name):
    (folder / name).write_text(BAD_LINES[name])
    assert len(whole(folder / name, out=(out := Output("quiet")))) == COUNT
    assert len(out.warnings) == 2 and all("rows are bad: line" in warning and "line 2" in warning for warning in out.warnings)


REFUSED_FILES = {
    "deep.json": '[{"image": "0.png", "text": ' + "[" * 100_000,
    "deep_objects.json": '{"a":' * 100_000,
    "metadata.jsonl": '{"file_name": "0.png", "text": ' + "[" * 100_000,
    "latin.csv": "image,text\n0.png,ä\n".encode("latin-1"),
    "unmarked.csv": "image,text\n0.png,ä\n".encode("utf-16-le"),
    "twice.csv": "image,text,text\n0.png,a,b\n",
    "open.csv": GOOD_CSV + '0.png,"a\n' + GOOD_CSV,
    "header.csv": "image,text\n",
    "blank.csv": "\n\n",
    "records.json": '{"data": [{"image": "0.png", "text": "a"}]}',
    "number.json": "3",
    "binary.csv": bytes(range(256)) * 10,
    "binary.parquet": bytes(range(256)) * 10,
}


@pytest.mark.parametrize("name", REFUSED_FILES)
def test_files_that_are_refused_in_a_sentence(folder, name):
    content = REFUSED_FILES[name]
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    error = refused(REFUSED, folder / name)
    assert "\n" not in error.message and len(error.message) < 400
    if name == "metadata.jsonl":
        assert "nested too deeply (line 1)" in error.message
    (folder / name).unlink()


def test_a_broken_line_is_told_by_its_number(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a":\n{"a": 2}')
    first, broken, last = read_files([str(tmp_path / "a.jsonl")])
    assert (first, last) == ({"a": "1"}, {"a": "2"}) and broken[BROKEN] == ("line that is no JSON", "line 3")


@pytest.mark.parametrize(
    "cell",
    [
        {"path": 3},
        {"bytes": "x"},
        {"path": None},
        {"a": 1},
        {},
        3,
        3.5,
        True,
        None,
        [1],
        [{"path": "0.png"}],
        "hf://datasets/a/b/0.png",
    ]
    + ["http://host/hf://datasets/a/b", "a\0.png", "\ud800.png", "/dev/zero", ".", "x" * 5000, b"", {"bytes": b""}],
)
@pytest.mark.parametrize("root", ["folder", "hub", None])
def test_a_strange_image_cell_is_a_bad_row(folder, cell, root):
    place = {"folder": folder, "hub": Hub("org/name"), None: None}[root]
    with pytest.raises(BadRow):
        read_row({"image": cell, "text": "a"}, FoundColumns("image", "text"), place)


# The hub and the net -------------------------------------------------------------------------------------------------


def test_only_a_data_sets_own_addresses_are_fetched(folder, tmp_path, monkeypatch):
    hub = Hub("org/name", (tmp_path / "cache",))
    own = ["hf://datasets/org/name/a.png", "hf://datasets/org/name@main/b/a.png", "zip://a.png::hf://datasets/org/name@1/a.zip"]
    others = [
        "hf://datasets/org/names/a.png",
        "hf://datasets/org/name/../other/a.png",
        "http://host/hf://datasets/org/name/a.png",
    ]
    others += [
        "hf://org/name/a.png",
        "zip://a::http://host/hf://datasets/org/name/a",
        "file:///etc/passwd",
        "../0.png",
        "0.png",
    ]
    assert all(map(hub.owns, own)) and not any(map(hub.owns, others))
    for path in [*others, str(folder / "0.png")]:
        with pytest.raises(BadRow, match="none of the data set's own"):
            read_content(path, hub)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "0.png").write_bytes(b"kept")
    assert read_content({"bytes": None, "path": str(tmp_path / "cache" / "0.png")}, hub) == b"kept"
    with pytest.raises(BadRow):
        read_content(str(tmp_path / "cache" / ".." / "secret.png"), hub)


def test_tables_on_the_hub_are_read_as_they_are_written(folder, tmp_path):
    """A CSV there: its words stay words, and its rows cannot name files of this machine."""
    (tmp_path / "repo").mkdir()
    rows = "".join(f"{folder / f'{n}.png'},true,007\n" for n in range(COUNT))
    (tmp_path / "repo" / "train.csv").write_text("image,text,answer\n" + rows)
    code = """
import sys
from comp_cli.data.sources import open_pairs
from comp_cli.errors import CompError
from comp_cli.cli.output import Output

pairs = open_pairs("org/table", progress=Output("json"))
print(next(iter(pairs.splits["train"].rows())) | {"image": 0})
try:
    pairs.read("calibration")
except CompError as error:
    print(error.exit_code, error.message)
"""
    with hub_server.HubServer({"org/table": hub_server.Repo({"main": tmp_path / "repo"})}) as hub:
        hub._server.RequestHandlerClass = type("Handler", (DataHandler,), {"hub": hub})
        home = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        done = subprocess.run([sys.executable, "-c", code], env=os.environ | home, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    row, error = done.stdout.splitlines()
    assert row == "{'image': 0, 'text': 'true', 'answer': '007'}"
    assert error.startswith(f"{REFUSED} ") and "image that is none of the data set's own (24)" in error


NO_SOCKETS = """
import sys
asked = []
sys.addaudithook(lambda event, args: event in ("socket.connect", "socket.getaddrinfo", "socket.sendto") and asked.append(args))
from comp_cli.data.sources import open_pairs
from comp_cli.cli.output import Output
for path in sys.argv[1:]:
    print(len(list(open_pairs(path, progress=Output("quiet")).read("calibration"))), asked)
"""


def test_reading_local_tables_opens_no_socket(folder, tmp_path):
    """`datasets` would count the load on a server; without the environment of the tests, which says offline."""
    jsonl = table(folder / "local.jsonl", {"text": ['"a"']})
    columns = {"image": [str(folder / f"{n}.png") for n in range(COUNT)], "text": ["a"] * COUNT}
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "local.parquet")
    offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_UPDATE_DOWNLOAD_COUNTS")
    environment = {name: value for name, value in os.environ.items() if name not in offline} | {"HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", NO_SOCKETS, jsonl, tmp_path / "local.parquet"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [line.split(" ", 1)[1] for line in done.stdout.splitlines()] == ["[]", "[]"]


def test_code_in_data_sets_is_not_run(tmp_path):
    """Scripts are no tables, and what bytes hold is no text."""
    marker = tmp_path / "ran"
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_text(f"open({str(marker)!r}, 'w')")
    refused(REFUSED, tmp_path / "set")
    import pickle

    class Evil:
        def __reduce__(self):
            return open, (str(marker), "w")

    evil = pickle.dumps(Evil())
    datasets.Dataset.from_dict({"image": [evil] * 3, "text": [evil] * 3}).to_parquet(tmp_path / "evil.parquet")
    refused(REFUSED, tmp_path / "evil.parquet")
    assert not marker.exists()
