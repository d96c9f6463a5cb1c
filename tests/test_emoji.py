"""Real pictures: which emoji are chosen, what they are called, a step of the training. A few emoji of our own, no network."""

import json

import pytest
import torch
import train_emoji
import write_emoji
from PIL import Image
from train_clip import UNKNOWN, build_model, build_processor
from write_emoji import Emoji

ENTRIES = [
    {"hexcode": "1F431", "label": "cat face", "tags": ["animal", "cat", "kitten pet"], "group": 3},
    {"hexcode": "2764-FE0F", "label": "red heart", "tags": ["love"], "group": 0},
    {"hexcode": "1F1E8-1F1EE", "label": "flag: Côte d’Ivoire", "tags": ["CI"], "group": 9},
    {
        "hexcode": "1F44B",
        "label": "waving hand",
        "group": 1,
        "skins": [{"hexcode": "1F44B-1F3FB", "label": "waving hand: light"}],
    },
    {"hexcode": "1F3FB", "label": "light skin tone", "group": 2},
    {"hexcode": "1F1E6", "label": "regional indicator A"},
]
SQUARE = {"body": '<path fill="red" d="M0 0h8v8H0z"/>'}


@pytest.fixture
def emoji() -> dict[str, Emoji]:
    names = {"2764-FE0F": "HEAVY BLACK HEART", "1F44B": "CAT FACE"}  # the second: a name that another emoji has by now
    return {one.name: one for one in write_emoji.read_emoji(ENTRIES, names)}


def test_skin_tones_and_letters_are_no_emoji(emoji):
    assert list(emoji) == ["cat face", "red heart", "flag: Côte d’Ivoire", "waving hand"]


def test_an_emoji_has_the_names_that_older_sets_call_it_by_unless_another_has_them(emoji):
    assert emoji["red heart"].key == "2764" and emoji["red heart"].slugs == ("red-heart", "heavy-black-heart")
    assert emoji["flag: Côte d’Ivoire"].slugs == ("flag-cote-divoire", "flag-for-cote-divoire")
    assert emoji["waving hand"].slugs == ("waving-hand",)


def test_a_text_is_the_name_and_what_the_tags_add_to_it(emoji):
    assert emoji["cat face"].text == "cat face, animal, kitten pet"
    assert write_emoji.text_of("a b c", ["d"] * 3 + list("efghijk")) == "a b c, d, e, f, g, h"  # 13 words and commas of 14


def test_icons_are_found_by_code_points_or_by_names(emoji):
    icons = {"icons": {"red-heart": SQUARE, "flag-for-cote-divoire": SQUARE}, "aliases": {"cat-face": {"parent": "red-heart"}}}
    by_name = {"1f431": "cat-face", "2764": "red-heart", "1f1e8-1f1ee": "flag-for-cote-divoire"}
    assert write_emoji.icon_names(emoji.values(), icons, {}) == by_name
    assert write_emoji.icon_names(emoji.values(), icons, {"2764-fe0f": "red-heart"}) == {"2764": "red-heart"}


def test_an_alias_is_its_parent_but_not_where_it_is_turned():
    icons = {
        "icons": {"a": SQUARE},
        "aliases": {"b": {"parent": "a"}, "c": {"parent": "a", "hFlip": True}},
        "width": 8,
        "height": 8,
    }
    assert write_emoji.svg_of(icons, "b") == write_emoji.svg_of(icons, "a")
    assert 'viewBox="0 0 8 8"' in write_emoji.svg_of(icons, "a") and SQUARE["body"] in write_emoji.svg_of(icons, "a")
    assert write_emoji.svg_of(icons, "c") is None


def test_what_is_transparent_becomes_white():
    picture = Image.new("RGBA", (256, 256), (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (0, 0, 128, 256))
    drawn = write_emoji.on_white(picture)
    assert drawn.mode == "RGB" and drawn.size == (64, 64)
    assert drawn.getpixel((5, 5)) == (255, 0, 0) and drawn.getpixel((60, 5)) == (255, 255, 255)
    flat = write_emoji.on_white(Image.new("RGB", (256, 128), "red"))
    assert flat.size == (64, 64) and flat.getpixel((5, 32)) == (255, 0, 0) and flat.getpixel((5, 5)) == (255, 255, 255)


def test_an_emoji_is_chosen_if_the_test_style_and_enough_training_styles_have_it(emoji):
    training = [style for style in write_emoji.STYLES if style not in write_emoji.SPLITS]
    (test,) = (style for style, split in write_emoji.SPLITS.items() if split == "test")
    having = {style: {"1f431", "2764"} for style in training} | {"noto-v1": set(), test: {"1f431", "1f44b"}}
    assert [one.name for one in write_emoji.choose(list(emoji.values()), having)] == ["cat face"]
    few = having | {style: set() for style in training[write_emoji.FEWEST - 1 :]}
    assert write_emoji.choose(list(emoji.values()), few) == []


@pytest.fixture
def folder(tmp_path):
    """Two emoji, one in two styles and one in three."""
    rows = []
    for number, key in enumerate(["cat", "dog", "cat", "dog", "dog"]):
        Image.new("RGB", (64, 64), (40 * number, 255, 0)).save(tmp_path / f"{number}.png")
        rows.append(
            {"file_name": f"{number}.png", "text": f"{key} (one), x", "name": f"{key} (one)", "tags": ["x"], "emoji": key}
        )
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_pictures_belong_to_their_emoji_and_all_words_are_known(folder):
    rows = train_emoji.read_rows(folder, "train")
    emoji = train_emoji.by_emoji(rows)
    assert [one.rows for one in emoji] == [[0, 2], [1, 3, 4]]
    assert train_emoji.read_pictures(folder, rows)[:, 0, 0, 0].tolist() == [0, 40, 80, 120, 160]
    tokenizer = build_processor(train_emoji.vocabulary(emoji), train_emoji.LONGEST, 64).tokenizer
    assert not any(UNKNOWN in ids for ids in tokenizer([row["text"] for row in rows])["input_ids"])


def test_augmentation_leaves_white_white_and_turns_some_grey():
    torch.manual_seed(0)
    white = torch.ones(8, 3, 64, 64)
    torch.testing.assert_close(train_emoji.recoloured(train_emoji.moved(white)), white)
    colours = train_emoji.recoloured(torch.rand(200, 3, 4, 4))
    grey = (colours.amax(1) - colours.amin(1)).amax((1, 2)) < 1e-5
    assert 10 < grey.sum() < 50


def test_a_batch_has_every_emoji_in_several_styles_and_a_step_reaches_every_weight(folder):
    torch.manual_seed(0)
    rows = train_emoji.read_rows(folder, "train")
    emoji, pictures = train_emoji.by_emoji(rows), train_emoji.read_pictures(folder, rows)
    processor = build_processor(train_emoji.vocabulary(emoji), train_emoji.LONGEST, 64)
    chosen, drawn, texts = train_emoji.draw(emoji, pictures, processor.tokenizer, 2, 3)
    assert sorted(chosen.tolist()) == [0, 1] and drawn.shape == (6, 3, 64, 64) and len(texts["input_ids"]) == 2
    model, table = build_model(processor.tokenizer, 64), train_emoji.Table(emoji, 128)
    train_emoji.step_loss(model, table, (chosen, drawn, texts)).backward()
    assert all(weight.grad is not None for weight in [*model.parameters(), *table.parameters()])
    for number, ids in zip(chosen, texts["input_ids"], strict=True):
        assert emoji[number].name.split()[0] in processor.tokenizer.decode(ids)
