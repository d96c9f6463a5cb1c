"""Users' own pairs: every format, every way to be wrong. Images are a few pixels whose colour tells which they are."""

import csv
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import hub_server
import pytest
from PIL import Image

from comp_cli.cli.exit_codes import FAILED, REFUSED, USAGE
from comp_cli.cli.output import Output
from comp_cli.data import rows as rows_module
from comp_cli.data.batches import fingerprint
from comp_cli.data.cells import read_label
from comp_cli.data.rows import Columns, FoundColumns, Pair, Tally, read_rows
from comp_cli.data.sources import open_pairs
from comp_cli.data.splits import choose_split
from comp_cli.errors import CompError
from comp_cli.tasks import TASKS

COUNT = 40


def colour(index: int) -> tuple[int, int, int]:
    return 5 * index, 200, 255 - 5 * index


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A folder with images/0.png to images/39.png; tests write their tables into copies of it."""
    folder = tmp_path_factory.mktemp("photos") / "images"
    folder.mkdir()
    for index in range(COUNT):
        Image.new("RGB", (6, 4), colour(index)).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def folder(photos, tmp_path) -> Path:
    """An empty folder whose images/ holds the photos."""
    (tmp_path / "pairs" / "images").mkdir(parents=True)
    for photo in photos.iterdir():
        os.link(photo, tmp_path / "pairs" / "images" / photo.name)
    return tmp_path / "pairs"


def rows(numbers=range(COUNT), **more):
    return [{"image": f"images/{i}.png", "text": f"text {i}"} | {k: f(i) for k, f in more.items()} for i in numbers]


def write(path: Path, table: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in table))
        case ".json":
            path.write_text(json.dumps(table))
        case ".csv" | ".tsv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, table[0], delimiter="\t" if path.suffix == ".tsv" else ",")
                writer.writeheader()
                writer.writerows(table)
        case ".parquet":
            datasets.Dataset.from_list(table).to_parquet(path)
    return path


def opened(data, out=None, **options):
    return open_pairs(str(data), progress=out or Output("quiet"), **options)


def read(data, purpose="calibration", limit=None, seed=0, **options):
    return list(opened(data, **options).read(purpose, limit, seed))


def refused(code, *arguments, **options) -> CompError:
    with pytest.raises(CompError) as caught:
        read(*arguments, **options)
    assert caught.value.exit_code == code, caught.value.message
    return caught.value


def numbers(pairs) -> list[int]:
    """Which pairs these are, by their texts; their images must be the ones that belong to them."""
    found = [int(pair.text.split()[1]) for pair in pairs]
    assert [pair.image.convert("RGB").getpixel((0, 0)) for pair in pairs] == [colour(i) for i in found]
    return found


def everything(data, **options) -> list[int]:
    """Calibration and evaluation pairs of a set with one split; they must be disjoint."""
    first, second = (numbers(read(data, purpose, **options)) for purpose in ("calibration", "evaluation"))
    assert not set(first) & set(second)
    assert len(first) > len(second) > 0
    return sorted(first + second)


# Formats -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_a_file_with_image_paths_beside_it(folder, suffix):
    path = write(folder / f"pairs{suffix}", rows(match=lambda i: i % 2))
    assert everything(path) == list(range(COUNT))
    pairs = read(path)
    assert [pair.label for pair in pairs] == [i % 2 for i in numbers(pairs)]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_folder_with_one_table_is_as_good_as_the_file(folder, suffix):
    path = write(folder / f"pairs{suffix}", rows())
    assert numbers(read(folder)) == numbers(read(path))
    assert all(pair.label is None for pair in read(folder))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_an_imagefolder(photos, tmp_path, suffix):
    """Names such as train_1.png and test_1.png would make `datasets` see splits; other tables are not pairs."""
    for index in range(COUNT):
        os.link(photos / f"{index}.png", tmp_path / f"{'test' if index % 2 else 'train'}_{index}.png")
    table = [{"file_name": f"{'test' if i % 2 else 'train'}_{i}.png", "text": f"text {i}"} for i in range(COUNT)]
    write(tmp_path / f"metadata{suffix}", table)
    write(tmp_path / "licences.json", [{"by": "somebody"}])
    assert everything(tmp_path) == list(range(COUNT))


def test_an_imagefolder_with_splits(photos, tmp_path):
    for split, part in {"train": range(20), "validation": range(20, 30), "test": range(30, 40)}.items():
        (tmp_path / split).mkdir()
        for index in part:
            os.link(photos / f"{index}.png", tmp_path / split / f"{index}.png")
        write(tmp_path / split / "metadata.csv", [{"file_name": f"{i}.png", "text": f"text {i}"} for i in part])
    assert sorted(numbers(read(tmp_path))) == list(range(20))
    assert sorted(numbers(read(tmp_path, "evaluation"))) == list(range(20, 30))
    assert sorted(numbers(read(tmp_path, "evaluation", split="validation"))) == list(range(30, 40))
    assert sorted(numbers(read(tmp_path / "train"))) == sorted(numbers(read(tmp_path / "train" / "metadata.csv")))
    refused(REFUSED, tmp_path / "test")


def test_files_named_after_splits(folder):
    write(folder / "coco_train.jsonl", rows(range(20)))
    write(folder / "coco_val.jsonl", rows(range(20, 40)))
    assert sorted(numbers(read(folder))) == list(range(20))
    assert sorted(numbers(read(folder, "evaluation"))) == list(range(20, 40))


def test_sharded_files(folder):
    for shard in range(4):
        write(folder / f"train-{shard:05d}-of-00004.csv", rows(range(10 * shard, 10 * shard + 10)))
    assert everything(folder) == list(range(COUNT))


def test_absolute_paths(photos, tmp_path):
    table = [{"image": str(photos / f"{i}.png"), "text": f"text {i}"} for i in range(COUNT)]
    assert everything(write(tmp_path / "pairs.jsonl", table)) == list(range(COUNT))


def png(index: int) -> bytes:
    Image.new("RGB", (6, 4), colour(index)).save(content := io.BytesIO(), "PNG")
    return content.getvalue()


@pytest.mark.parametrize("stored", ["image feature", "dict", "bytes"])
def test_parquet_with_images_inside(tmp_path, stored):
    images = [png(i) for i in range(COUNT)]
    columns = {"image": images, "caption": [f"text {i}" for i in range(COUNT)]}
    if stored != "bytes":
        columns["image"] = [{"bytes": image, "path": None} for image in images]
    table = datasets.Dataset.from_dict(columns)
    if stored == "image feature":
        table = table.cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "pairs.parquet")
    assert everything(tmp_path) == list(range(COUNT))


def test_a_folder_of_save_to_disk(photos, tmp_path):
    columns = {"image": [str(photos / f"{i}.png") for i in range(COUNT)], "text": [f"text {i}" for i in range(COUNT)]}
    columns["label"] = [i % 2 for i in range(COUNT)]
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    table = table.cast_column("label", datasets.ClassLabel(names=["match", "mismatch"]))
    datasets.DatasetDict(train=table.select(range(30)), test=table.select(range(30, 40))).save_to_disk(tmp_path / "saved")
    pairs = read(tmp_path / "saved")
    assert sorted(numbers(pairs)) == list(range(30))
    assert [pair.label for pair in pairs] == [1 - i % 2 for i in numbers(pairs)]  # the names of the classes count
    assert sorted(numbers(read(tmp_path / "saved", "evaluation"))) == list(range(30, 40))


def test_several_texts_of_an_image(folder):
    table = [{"image": f"images/{i}.png", "captions": [f"text {i}", " ", f"text {i} again"]} for i in range(COUNT)]
    table[3]["captions"] = "text 3"
    path = write(folder / "pairs.jsonl", table)
    assert everything(path) == sorted([i for i in range(COUNT) for _ in range(1 if i == 3 else 2)])
    assert len(read(path, limit=7)) == 7


def test_pairs_become_batches(folder, dense):
    path = write(folder / "pairs.csv", rows(match=lambda i: ["no", "yes"][i % 2]))
    (batch,) = dense.collate.batches(opened(path).read("calibration", 4), 8)
    assert batch.inputs["pixel_values"].shape == (4, 3, 48, 48)
    assert batch.labels.tolist() == [number % 2 for number in numbers(read(path, limit=4))]


def test_names_of_classes_are_texts(photos, tmp_path):
    """An image classification set, as zero-shot classification takes it: the label column is the text."""
    columns = {"image": [str(photos / f"{i}.png") for i in range(COUNT)], "label": [i % 3 for i in range(COUNT)]}
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    table.cast_column("label", datasets.ClassLabel(names=["cat", "dog", "crane"])).save_to_disk(tmp_path / "saved")
    pairs = open_pairs(str(tmp_path / "saved"), progress=Output("quiet"), columns=Columns(text="label")).read("calibration")
    found = list(pairs)
    assert {pair.text for pair in found} == {"cat", "dog", "crane"} and {pair.label for pair in found} == {None}


def test_retrieval_takes_pairs_that_match_and_knows_their_images(folder):
    table = rows(match=lambda i: i % 2)
    table += [row | {"text": row["text"] + " again"} for row in table]
    pairs = list(opened(write(folder / "pairs.jsonl", table)).read("calibration", 12, 0, TASKS["retrieval"].accepts))
    assert len(pairs) == 12 and all(pair.label == 1 for pair in pairs)
    ids = {number: {p.image_id for p, n in zip(pairs, numbers(pairs), strict=True) if n == number} for number in numbers(pairs)}
    assert all(len(found) == 1 for found in ids.values()) and len(set.union(*ids.values())) == len(ids)


# Which pairs, in which order -----------------------------------------------------------------------------------------


def test_the_seed_decides_the_order(folder):
    path = write(folder / "pairs.jsonl", rows())
    assert numbers(read(path, seed=1)) == numbers(read(path, seed=1))
    assert numbers(read(path, seed=1)) != numbers(read(path, seed=2))
    assert numbers(read(path, limit=5, seed=1)) == numbers(read(path, seed=1))[:5]


def test_an_image_serves_one_purpose_for_every_seed(folder):
    table = rows() + [row | {"image": "./" + row["image"]} for row in rows()]
    path = write(folder / "pairs.jsonl", table)
    calibration = {number for seed in range(3) for number in numbers(read(path, seed=seed))}
    evaluation = {number for seed in range(3) for number in numbers(read(path, "evaluation", seed=seed))}
    assert not calibration & evaluation
    assert calibration | evaluation == set(range(COUNT))


def test_no_more_images_are_opened_than_asked_for(folder, monkeypatch):
    path = write(folder / "pairs.jsonl", rows())
    decode, opens = rows_module.decode, []
    monkeypatch.setattr(rows_module, "decode", lambda *a, **k: opens.append(a) or decode(*a, **k))
    pairs = opened(path).read("calibration", 5)
    assert len(opens) == 1
    assert len(list(pairs)) == 5
    assert len(opens) == 5


SPLITS = {
    ("train", "validation", "test"): ("train", "validation"),
    ("test", "val", "train"): ("train", "val"),
    ("train", "test"): ("train", "test"),
    ("validation", "test"): ("validation", "test"),
    ("validation",): ("validation", "validation"),
    ("pairs",): ("pairs", "pairs"),
    ("pairs", "minitest"): ("pairs", "minitest"),
    ("training", "eval"): ("training", "eval"),
}


@pytest.mark.parametrize("splits", SPLITS)
def test_splits_that_are_taken(splits):
    assert tuple(choose_split("set", splits, purpose, None) for purpose in ("calibration", "evaluation")) == SPLITS[splits]


def test_test_splits_are_evaluated_only():
    assert choose_split("set", ["test"], "evaluation", None) == "test"
    for splits, wanted, code in ((["test"], None, REFUSED), (["train", "testA"], "testA", USAGE), (["a", "b"], None, USAGE)):
        with pytest.raises(CompError) as caught:
            choose_split("set", splits, "calibration", wanted)
        assert caught.value.exit_code == code


def test_a_test_file_is_refused(folder):
    path = write(folder / "test.jsonl", rows())
    assert "never calibrates" in refused(REFUSED, path).message
    assert sorted(numbers(read(path, "evaluation"))) == list(range(COUNT))


def test_unknown_split(folder):
    path = write(folder / "pairs.jsonl", rows())
    assert refused(USAGE, path, split="dev").hint == "Splits: train."


# Columns -------------------------------------------------------------------------------------------------------------


def test_named_columns(folder):
    table = [
        {"left": f"images/{i}.png", "right": "images/0.png", "de": f"text {i}", "text": "x", "ok": 1} for i in range(COUNT)
    ]
    path = write(folder / "pairs.jsonl", table)
    assert "Columns: left, right, de, text, ok. " in refused(USAGE, path).hint
    assert everything(path, columns=Columns("left", "de", "ok")) == list(range(COUNT))
    assert "--text-column" in refused(USAGE, path, columns=Columns("left", "en")).hint


def test_unclear_columns(folder):
    path = write(folder / "pairs.jsonl", rows(caption=str))
    error = refused(USAGE, path)
    assert "text or caption" in error.message
    assert "Columns: image, text, caption." in error.hint and "--text-column" in error.hint
    assert everything(path, columns=Columns(text="text")) == list(range(COUNT))


def test_no_text_column(folder):
    path = write(folder / "pairs.csv", [{"image": "images/0.png", "size": 3}])
    assert "--text-column" in refused(USAGE, path).hint


@pytest.mark.parametrize("value", [1, 1.0, "1", True, "true", "T", " Match", "yes", "y", "matched"])
def test_labels_that_say_match(value):
    assert read_label(value) == 1


@pytest.mark.parametrize("value", [0, 0.0, "0", False, "False", "F", "mismatch", "no", "N"])
def test_labels_that_say_mismatch(value):
    assert read_label(value) == 0


@pytest.mark.parametrize("value", [2, -1, "cat", "", None, 0.5, [1]])
def test_what_is_no_label(value):
    assert read_label(value) is None


def test_a_label_column_of_something_else_is_left_out(folder):
    path = write(folder / "pairs.jsonl", rows(label=lambda i: i % 3))
    pairs = read(path, out=(out := Output("quiet")))
    assert all(pair.label is None for pair in pairs)
    assert "holds 2" in out.warnings[0]
    assert read(write(folder / "other.jsonl", rows(match=lambda i: i % 2)), columns=Columns(label=""))[0].label is None
    assert "'label'" in refused(USAGE, write(folder / "none.jsonl", rows()), columns=Columns(label="label")).message


# Bad rows ------------------------------------------------------------------------------------------------------------


def test_bad_rows_are_skipped_and_counted(folder):
    table = rows(match=lambda i: i % 2)
    for index in range(7):
        table[index]["image"] = f"images/lost{index}.png"
    table[7]["text"] = "  "
    table[8]["text"] = None
    table[9]["match"] = "perhaps"
    table[10]["image"] = None
    table[39]["image"] = "images"
    (folder / "images" / "11.png").unlink()
    (folder / "images" / "11.png").write_bytes(png(11)[:50])
    (folder / "images" / "12.png").unlink()
    (folder / "images" / "12.png").write_text("no image")
    table[9]["match"] = None
    write(folder / "train.jsonl", table)
    write(folder / "validation.jsonl", rows(range(3)))
    pairs = read(folder, out=(out := Output("quiet")))
    assert sorted(numbers(pairs)) == list(range(13, 39))
    (warning,) = out.warnings
    assert "14 of 40 rows are bad" in warning
    assert "missing image (9): " in warning and warning.count("lost") <= 5 and " and 4 more" in warning
    assert "no text (2): " in warning
    assert "image that cannot be read (2): " in warning
    assert "no match or mismatch as label (1): None" in warning


def test_a_set_that_is_mostly_bad_is_refused(folder):
    table = rows()
    for index in range(30):
        table[index]["image"] = f"images/lost{index}.png"
    path = write(folder / "pairs.jsonl", table)
    error = refused(REFUSED, path)
    assert "missing image" in error.message and "more" in error.message
    assert str(folder) in error.hint


def test_a_hopeless_set_is_given_up_early(folder, monkeypatch):
    path = write(folder / "pairs.jsonl", [{"image": f"lost{i}.png", "text": "x"} for i in range(1000)])
    with pytest.raises(CompError, match="6 of 6 rows are bad"):
        opened(path).read("calibration", 5)  # at the call, before a pair is asked for


@pytest.mark.parametrize("value", [None, "", ["images/0.png"], "https://example.org/0.png", "/no/such/image.png"])
@pytest.mark.parametrize("purpose", ["calibration", "evaluation"])
def test_what_is_no_image(folder, value, purpose):
    path = write(folder / "pairs.jsonl", [{"image": value, "text": f"text {i}"} for i in range(3)])
    error = refused(REFUSED, path, purpose)
    assert "missing image (3)" in error.message or "no pairs" in error.message and isinstance(value, str) and value


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.json", "header.csv", "header.parquet"])
def test_empty_sets(tmp_path, name):
    content = {"empty.jsonl": "", "empty.json": "[]", "header.csv": "image,text\n"}
    if name in content:
        (tmp_path / name).write_text(content[name])
    else:
        datasets.Dataset.from_dict({"image": [], "text": []}).to_parquet(tmp_path / name)
    refused(REFUSED, tmp_path / name)


def test_a_set_too_small_to_hold_some_out(folder):
    path = write(folder / "pairs.jsonl", rows([0]))
    missing = [purpose for purpose in ("calibration", "evaluation") if not _reads(path, purpose)]
    assert len(missing) == 1
    assert "train and validation" in refused(REFUSED, path, missing[0]).hint


def _reads(path, purpose) -> bool:
    try:
        return bool(read(path, purpose))
    except CompError:
        return False


@pytest.mark.parametrize("name", ["broken.jsonl", "broken.json", "broken.parquet", "broken.csv"])
def test_broken_tables(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"image": "a.png", "text": "a"}\n{not json\n"a,b\nc"d,e,f,g\n')
    error = refused(REFUSED, tmp_path / name)
    assert "\n" not in error.message


# What was typed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["/no/such/folder", "./pairs", "pairs.jsonl", "a/b/c", "~/nothing-here-of-this-name"])
def test_unknown_paths(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no such file" in refused(USAGE, data).message


def test_a_file_of_another_kind(folder):
    (folder / "pairs.xlsx").write_bytes(b"PK")
    assert ".jsonl" in refused(USAGE, folder / "pairs.xlsx").hint
    assert "metadata" in refused(REFUSED, folder).hint  # images without texts


def test_tables_that_are_not_clear(folder):
    write(folder / "pairs.csv", rows())
    write(folder / "pairs.jsonl", rows())
    assert "pairs.csv" in refused(USAGE, folder).message
    (folder / "pairs.jsonl").unlink()
    write(folder / "more" / "pairs.csv", rows())
    assert "more/pairs.csv" in refused(USAGE, folder).message


def test_a_revision_needs_the_hub(folder):
    refused(USAGE, write(folder / "pairs.csv", rows()), revision="main")


def test_strange_characters_in_paths(folder):
    folder = folder.rename(folder.with_name("my [pairs] *?"))
    assert everything(write(folder / "a[1] #ü.jsonl", rows())) == list(range(COUNT))


# The library ---------------------------------------------------------------------------------------------------------


def test_nothing_is_written_and_nothing_is_said(folder, tmp_path):
    """A process of its own: the caches of `datasets` are where its environment says."""
    path = write(folder / "pairs.jsonl", rows())
    before = sorted(folder.rglob("*"))
    code = f"""
from comp_cli.data.sources import open_pairs
from comp_cli.cli.output import Output
print(len(list(open_pairs({str(path)!r}, progress=Output('json')).read('calibration', 3))))
"""
    home = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | home, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr, done.returncode) == ("3\n", "", 0)
    assert sorted(folder.rglob("*")) == before
    assert not list((tmp_path / "tmp").iterdir())
    assert not (tmp_path / "hf").exists()


def test_datasets_is_imported_only_to_read():
    code = "import sys, comp_cli.data.sources; sys.exit('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


# The hub -------------------------------------------------------------------------------------------------------------


class DataHandler(hub_server._Handler):
    """The hub's data sets as the server has its models; folders are listed one by one, with sizes that are true."""

    def do_GET(self) -> None:
        self.path = self.path.replace("/api/datasets/", "/api/models/").replace("/datasets/", "/", 1)
        super().do_GET()

    do_HEAD = do_GET

    def api(self, parts: list[str]) -> None:
        if parts[2:3] != ["tree"]:
            return super().api(parts)
        _, top = self.open("/".join(parts[:2]), parts[3])
        folder = top.joinpath(*parts[4:])
        if not folder.is_dir():
            return self.answer(404, code="EntryNotFound")
        entries = [
            {
                "type": "file" if path.is_file() else "directory",
                "path": str(path.relative_to(top)),
                "size": path.stat().st_size,
                "oid": "0" * 40,
            }
            for path in sorted(folder.iterdir())
        ]
        self.answer(200, json.dumps(entries).encode())


ASK_THE_HUB = """
import sys
from comp_cli.data.sources import open_pairs
from comp_cli.errors import CompError
from comp_cli.cli.output import Output

for data in sys.argv[1:]:
    try:
        pairs = open_pairs(data, progress=Output("json"))
        found = [[(pair.text, pair.label) for pair in pairs.read(purpose)] for purpose in ("calibration", "evaluation")]
        print([len(part) for part in found], sorted(found[0])[0], pairs.describe("evaluation"))
    except CompError as error:
        print(error.exit_code, error.message, error.hint)
"""


def test_data_sets_on_the_hub(photos, tmp_path):
    """Streamed from a loopback server by a process of its own: the libraries read HF_ENDPOINT when they are imported."""
    table = datasets.Dataset.from_dict(
        {"image": [png(i) for i in range(COUNT)], "caption": [f"text {i}" for i in range(COUNT)]}
    )
    table = table.add_column("label", [i % 2 for i in range(COUNT)]).cast_column("image", datasets.Image())
    table = table.cast_column("label", datasets.ClassLabel(names=["match", "mismatch"]))
    (tmp_path / "parquet" / "data").mkdir(parents=True)
    table.select(range(30)).to_parquet(tmp_path / "parquet" / "data" / "train-00000-of-00001.parquet")
    table.select(range(30, 40)).to_parquet(tmp_path / "parquet" / "data" / "test-00000-of-00001.parquet")
    for index in range(COUNT):
        (tmp_path / "images" / "train").mkdir(parents=True, exist_ok=True)
        os.link(photos / f"{index}.png", tmp_path / "images" / "train" / f"{index}.png")
    metadata = [{"file_name": f"{i}.png", "text": f"text {i}"} for i in range(COUNT)]
    write(tmp_path / "images" / "train" / "metadata.jsonl", metadata)
    names = ["org/parquet", "hf://datasets/org/images", "org/parquet:other", "org/parquet@other", "org/none", "no name"]
    repos = {f"org/{name}": hub_server.Repo({"main": tmp_path / name}) for name in ("parquet", "images")}
    with hub_server.HubServer(repos) as hub:
        hub._server.RequestHandlerClass = type("Handler", (DataHandler,), {"hub": hub})
        home = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", ASK_THE_HUB, *names]
        done = subprocess.run(command, env=os.environ | home, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    parquet, images, config, revision, nothing, unnamed = done.stdout.splitlines()
    assert parquet == "[30, 10] ('text 0', 1) org/parquet, split test"
    assert images.endswith(", None) org/images, split train, the other fifth of the images")
    assert sum(json.loads(images[: images.index("]") + 1])) == COUNT
    assert config.startswith(f"{USAGE} ") and "Available: ['default']" in config and "org/name:config" in config
    assert revision.startswith(f"{REFUSED} ") and "other" in revision
    assert nothing.startswith(f"{REFUSED} ") and "HF_TOKEN" in nothing
    assert unnamed.startswith(f"{USAGE} ")


def test_the_hub_is_off_limits():
    assert "HF_HUB_OFFLINE" in refused(FAILED, "somebody/pairs").hint


# The fingerprint of what a set holds ----------------------------------------------------------------------------------


def test_the_fingerprint_is_of_the_content(folder, dense):
    """Images from files or from memory: the same. Another text, label, image or order, or no labels: another."""

    def of(pairs):
        return fingerprint(dense.collate.batches(pairs, 2))

    path = write(folder / "pairs.jsonl", [row | {"text": "a red circle"} for row in rows(range(4), match=lambda i: i % 2)])
    pairs = list(read_rows(map(json.loads, path.open()), FoundColumns("image", "text", "match"), folder, 4, Tally()))
    made = [Pair(Image.new("RGB", (6, 4), colour(i)), "a red circle", i % 2) for i in range(4)]
    assert len(of(pairs)) == 16 and of(pairs) == of(made)
    word, label, image = replace(made[3], text="a red square"), replace(made[3], label=0), replace(made[3], image=made[0].image)
    others = [[*made[:3], changed] for changed in (word, label, image)]
    others += [made[::-1], made[:3], [replace(pair, label=None) for pair in made]]
    assert len({of(pairs), *map(of, others)}) == 7
