"""Write public emoji sets as pairs of pictures and names: real pictures, to train a small CLIP on and to prune it with.

    pip install -c constraints.txt -r benchmarks/requirements-emoji.txt
    python scripts/write_emoji.py out/emoji

The sets come from npm (`npm pack`, kept in the folder). One style is the test split and one the validation split; the others
are for training and calibration. `train.jsonl`, `validation.jsonl`, `test.jsonl` have a line for each picture: file_name, text,
name, tags, emoji, style. Whatever is left out is counted and printed. The pictures have licences of their own: docs/methods.md.
"""

import argparse
import io
import json
import re
import subprocess
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

STYLES = {
    "noto": "@iconify-json/noto@1.2.9",
    "noto-v1": "@iconify-json/noto-v1@1.2.5",
    "openmoji": "@iconify-json/openmoji@1.2.29",
    "fluent-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "emojione": "@iconify-json/emojione@1.2.3",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "fluent-3d": "@lobehub/fluent-emoji-3d@1.1.0",
}
NAMES = "emojibase-data@17.0.0"
SPLITS = {"noto-v1": "validation", "fluent-3d": "test"}  # the others: train
FEWEST = 3  # training styles that have the emoji
IMAGE_SIZE = 64
WORDS = 14  # of a text, with its commas, where tags are added
COMPONENTS = 2  # the group of skin tones and hair, which are no emoji


@dataclass(frozen=True)
class Emoji:
    """key: its code points, hexadecimal, without the variation selector. slugs: what icon sets call it, the likeliest first."""

    key: str
    name: str
    tags: tuple[str, ...]
    slugs: tuple[str, ...]

    @property
    def text(self) -> str:
        return text_of(self.name, self.tags)


def text_of(name: str, tags: Iterable[str]) -> str:
    """The name, and as many of the tags as there is room for: those that say something new."""
    text = name
    for tag in tags:
        longer = f"{text}, {tag}"
        if not set(words(tag)) <= set(words(text)) and len(words(longer)) <= WORDS:
            text = longer
    return text


def words(text: str) -> list[str]:
    """As the tokenizer of scripts/train_emoji.py splits it."""
    return re.findall(r"\w+|[^\w\s]+", text.lower())


def key_of(hexcode: str) -> str:
    return "-".join(point for point in hexcode.lower().split("-") if point != "fe0f")


def slug(name: str) -> str:
    """ "flag: Côte d’Ivoire" -> "flag-cote-divoire", as icon sets write names."""
    plain = name.lower().translate(str.maketrans("àáâãäåçèéêëíñóôöúü", "aaaaaaceeeeinooouu", "'’“”!.&"))
    return re.sub("[^a-z0-9]+", "-", plain).strip("-")


def read_emoji(entries: Iterable[Mapping[str, Any]], unicode_names: Mapping[str, str]) -> list[Emoji]:
    """All emoji without their skin tones. Older sets call them by the names of Unicode, and flags "flag for ..."."""
    entries = [entry for entry in entries if entry.get("group") not in (None, COMPONENTS)]
    taken = {slug(entry["label"]) for entry in entries}
    found = []
    for entry in entries:
        old = [slug(unicode_names.get(entry["hexcode"], "")), slug(entry["label"].replace("flag: ", "flag for "))]
        slugs = [slug(entry["label"]), *(name for name in old if name and name not in taken)]
        found.append(Emoji(key_of(entry["hexcode"]), entry["label"], tuple(entry.get("tags", ())), tuple(slugs)))
    return found


def icon_names(emoji: Iterable[Emoji], icons: Mapping[str, Any], chars: Mapping[str, str]) -> dict[str, str]:
    """key -> the name of its icon: by its code points where the set has a table of them, else by its names."""
    if chars:
        by_key = {key_of(points): name for points, name in chars.items()}
        return {one.key: by_key[one.key] for one in emoji if one.key in by_key}
    known = icons["icons"].keys() | icons.get("aliases", {}).keys()
    named = {one.key: next((name for name in one.slugs if name in known), None) for one in emoji}
    return {key: name for key, name in named.items() if name}


def svg_of(icons: Mapping[str, Any], name: str) -> str | None:
    """The picture of an icon of a set as an SVG document; None for what is another icon turned or mirrored."""
    alias = icons.get("aliases", {}).get(name, {"parent": name})
    if alias.keys() != {"parent"} or alias["parent"] not in icons["icons"]:
        return None
    icon = icons["icons"][alias["parent"]]
    left, top, width, height = (icon.get(key, icons.get(key, 0)) for key in ("left", "top", "width", "height"))
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'


def on_white(picture: Image.Image) -> Image.Image:
    """IMAGE_SIZE square, RGB; a picture that is not square is padded."""
    picture = ImageOps.pad(picture.convert("RGBA"), (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS, color=(0, 0, 0, 0))
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    return white.convert("RGB")


def draw(svg: str) -> Image.Image:
    """Raises ValueError for what cannot be rendered. Four times as large as it will be, as the fluent-3d pictures are."""
    import resvg_py

    side = 4 * IMAGE_SIZE
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True))))


def fetch(package: str, folder: Path) -> tarfile.TarFile:
    """A package from npm, downloaded once."""
    name, _, version = package.rpartition("@")
    path = folder / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True)
    return tarfile.open(path)


def member(package: tarfile.TarFile, path: str) -> bytes:
    file = package.extractfile(f"package/{path}")
    if file is None:
        raise FileNotFoundError(f"{package.name}: no file {path}.")
    return file.read()


def pictures(style: str, emoji: list[Emoji], packages: Path, left_out: Counter) -> Iterator[tuple[str, Image.Image]]:
    """The pictures of a style, with the keys of their emoji; what cannot be had is counted."""
    with fetch(STYLES[style], packages) as package:
        if style == "fluent-3d":
            paths = {Path(name).stem: name for name in package.getnames() if name.endswith(".webp")}
            points = {key_of(stem): name.removeprefix("package/") for stem, name in paths.items()}
            drawn = {one.key: partial(open_picture, package, points[one.key]) for one in emoji if one.key in points}
        else:
            icons, chars = (json.loads(member(package, name)) for name in ("icons.json", "chars.json"))
            svgs = {key: svg_of(icons, name) for key, name in icon_names(emoji, icons, chars).items()}
            left_out["mirrored or turned"] = sum(svg is None for svg in svgs.values())
            drawn = {key: partial(draw, svg) for key, svg in svgs.items() if svg}
        left_out["no picture"] = len(emoji) - len(drawn) - left_out["mirrored or turned"]
        for key, make in drawn.items():
            try:
                picture = on_white(make())
            except ValueError:
                left_out["failed rendering"] += 1
                continue
            if picture.getextrema() == ((255, 255),) * 3:
                left_out["nothing but white"] += 1
            else:
                yield key, picture


def open_picture(package: tarfile.TarFile, path: str) -> Image.Image:
    return Image.open(io.BytesIO(member(package, path)))


def choose(emoji: list[Emoji], having: Mapping[str, set[str]]) -> list[Emoji]:
    """Emoji that the test style and enough of the training styles have. having: style -> keys."""
    training = [keys for style, keys in having.items() if style not in SPLITS]
    test = [having[style] for style, split in SPLITS.items() if split == "test"]
    return [
        one for one in emoji if all(one.key in keys for keys in test) and sum(one.key in keys for keys in training) >= FEWEST
    ]


def write(folder: Path) -> dict[str, Any]:
    """The pairs; returns what was counted."""
    with fetch(NAMES, folder / "packages") as package:
        entries, unicode_names = (json.loads(member(package, path)) for path in ("en/data.json", "meta/unicode-names.json"))
    emoji = read_emoji(entries, unicode_names)
    left_out = {style: Counter() for style in STYLES}
    drawn = {style: dict(pictures(style, emoji, folder / "packages", left_out[style])) for style in STYLES}
    chosen = choose(emoji, {style: set(found) for style, found in drawn.items()})
    written = {split: [] for split in ("train", "validation", "test")}
    for style, found in drawn.items():
        (folder / "images" / style).mkdir(parents=True, exist_ok=True)
        for one in chosen:
            if one.key in found:
                name = f"images/{style}/{one.key}.png"
                found[one.key].save(folder / name)
                row = {
                    "file_name": name,
                    "text": one.text,
                    "name": one.name,
                    "tags": one.tags,
                    "emoji": one.key,
                    "style": style,
                }
                written[SPLITS.get(style, "train")].append(row)
        left_out[style]["emoji of too few styles"] = len(found) - sum(one.key in found for one in chosen)
    for split, rows in written.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    counted = {split: len(rows) for split, rows in written.items()}
    return {"emoji": len(emoji), "chosen": len(chosen), "pictures": counted, "left out": left_out}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    print(json.dumps(write(parser.parse_args().folder), indent=2))
