"""Generated scenes with captions: the data of the `demo` model, seeded and procedural.

A scene is a few coloured shapes on a textured background, most of which is empty. Examples come in pairs of scenes that
differ in one thing (an attribute, a binding, a count, a relation), with captions that hold in exactly one of the two.
Every caption is therefore matched once and mismatched once: neither the text nor the image alone says anything about
the label, and every negative is a hard one. Splits are disjoint ranges of seeds.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 90, 220),
    "yellow": (240, 215, 40), "purple": (148, 60, 190), "white": (250, 250, 250),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 7, "large": 12}  # radius in px
NUMBERS = ("zero", "one", "two", "three", "four", "five")
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
FAMILIES = ("attribute", "binding", "count", "relation")
IMAGE_SIZE = 96
RELATION_MARGIN = 16  # px between two centres before "left of" or "above" is said of them
SPLITS = {"train": 0, "validation": 10**18, "test": 2 * 10**18}  # first seed of each


@dataclass(frozen=True)
class Thing:
    size: str
    colour: str
    shape: str
    x: int
    y: int


Scene = tuple[Thing, ...]


@dataclass(frozen=True)
class Caption:
    """A statement about a scene: `holds(scene)` is True, False, or None where a person might hesitate."""

    family: str
    text: str
    things: tuple[tuple[str | None, str | None, str | None], ...]  # (size, colour, shape), None for any
    number: int = 0
    relation: str = ""

    def holds(self, scene: Scene) -> bool | None:
        found = [self.matching(scene, wanted) for wanted in self.things]
        if self.family == "count":
            return len(found[0]) == self.number
        if self.family == "relation":
            if any(len(things) != 1 for things in found):
                return None
            dx, dy = RELATIONS[self.relation]
            (a,), (b,) = found
            distance = (a.x - b.x) * dx + (a.y - b.y) * dy
            return distance > 0 if abs(distance) >= RELATION_MARGIN else None
        return all(found)

    @staticmethod
    def matching(scene: Scene, wanted: tuple[str | None, str | None, str | None]) -> list[Thing]:
        """The things of a scene with the wanted (size, colour, shape)."""
        return [t for t in scene if all(w in (None, a) for w, a in zip(wanted, (t.size, t.colour, t.shape), strict=True))]


@dataclass(frozen=True)
class Example:
    """One image-text pair. `label` is 1 where the caption holds in the scene."""

    scene: Scene
    background: int  # seed of the background's texture
    caption: Caption
    label: int


def _random_thing(rng: random.Random, scene: Scene) -> Thing | None:
    """A thing that touches no other of the scene, even were all large, with a (colour, shape) of its own."""
    r = max(SIZES.values())
    for _ in range(100):
        x, y = rng.randint(r + 1, IMAGE_SIZE - r - 2), rng.randint(r + 1, IMAGE_SIZE - r - 2)
        if any(max(abs(x - t.x), abs(y - t.y)) < 2 * r + 2 for t in scene):
            continue
        size, colour, shape = rng.choice(tuple(SIZES)), rng.choice(tuple(COLOURS)), rng.choice(SHAPES)
        if all((colour, shape) != (t.colour, t.shape) for t in scene):
            return Thing(size, colour, shape, x, y)
    return None


def random_scene(rng: random.Random) -> Scene:
    """Two to four things. Colours and shapes repeat more often than by chance, so that counting has something to count."""
    scene: Scene = ()
    for _ in range(rng.randint(2, 4)):
        thing = _random_thing(rng, scene)
        if thing is None:  # no room left
            return random_scene(rng)
        if scene and rng.random() < 0.4:
            twin = rng.choice(scene)
            like = _like(rng, thing, twin)
            if all((like.colour, like.shape) != (t.colour, t.shape) for t in scene):
                thing = like
        scene += (thing,)
    return scene


def edit_scene(rng: random.Random, scene: Scene, family: str) -> Scene:
    """The same scene with one thing changed, so that captions of `family` can tell the two apart."""
    i, j = rng.sample(range(len(scene)), 2)
    a, b = scene[i], scene[j]
    if family == "attribute":
        what, values = rng.choice((("size", tuple(SIZES)), ("colour", tuple(COLOURS)), ("shape", SHAPES)))
        return _with(scene, {i: Thing(**vars(a) | {what: rng.choice([v for v in values if v != getattr(a, what)])})})
    if family == "binding":  # the same colours and shapes, bound the other way
        return _with(scene, {i: replace(a, colour=b.colour), j: replace(b, colour=a.colour)})
    if family == "relation":  # the same things, each in the other's place
        return _with(scene, {i: replace(a, x=b.x, y=b.y), j: replace(b, x=a.x, y=a.y)})
    if len(scene) > 2 and rng.random() < 0.5:
        return scene[:i] + scene[i + 1 :]
    new = _random_thing(rng, scene) if len(scene) < 5 and rng.random() < 0.5 else None
    if new:
        return (*scene, _like(rng, new, a))
    return _with(scene, {i: _like(rng, a, b)})


def _like(rng: random.Random, thing: Thing, other: Thing) -> Thing:
    """The thing with the colour or the shape of another one."""
    return rng.choice((replace(thing, colour=other.colour), replace(thing, shape=other.shape)))


def _with(scene: Scene, changed: dict[int, Thing]) -> Scene:
    return tuple(changed.get(k, t) for k, t in enumerate(scene))


def _noun(thing: Thing) -> str:
    return f"a {thing.colour} {thing.shape}"


def random_caption(rng: random.Random, scene: Scene, family: str) -> Caption:
    """A caption of `family` about things of the scene (a caption of a count may be about things that are not there)."""
    a, b = rng.sample(scene, 2)
    if family == "attribute":
        if rng.random() < 0.5:
            return Caption(family, f"a {a.size} {a.colour} {a.shape}", ((a.size, a.colour, a.shape),))
        return Caption(family, _noun(a), ((None, a.colour, a.shape),))
    pair = ((None, a.colour, a.shape), (None, b.colour, b.shape))
    if family == "binding":
        return Caption(family, f"{_noun(a)} and {_noun(b)}", pair)
    if family == "relation":
        name = rng.choice(tuple(RELATIONS))
        text = f"{_noun(a)} {name} {_noun(b)}"
        return Caption(family, text, pair, relation=name)
    wanted = rng.choice(((None, a.colour, None), (None, None, a.shape), (None, None, None)))
    number = len(Caption.matching(scene, wanted))
    noun = wanted[2] or "shape"
    words = [NUMBERS[number], wanted[1], noun if number == 1 else plural(noun)]
    return Caption(family, " ".join(w for w in words if w), (wanted,), number=number)


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def distinguishing(rng: random.Random, scene: Scene, other: Scene, family: str, tries: int = 40) -> Caption | None:
    """A caption that holds in `scene` and does not in `other`, or None where none was found."""
    for _ in range(tries):
        caption = random_caption(rng, scene, family)
        if caption.holds(scene) is True and caption.holds(other) is False:
            return caption
    return None


def hard_pair(seed: int) -> list[Example]:
    """Four examples: two scenes that differ in one thing, and for each a caption that holds in it and not in the other."""
    rng = random.Random(seed)
    family = FAMILIES[seed % len(FAMILIES)]
    while True:
        left = random_scene(rng)
        right = edit_scene(rng, left, family)
        of_left, of_right = distinguishing(rng, left, right, family), distinguishing(rng, right, left, family)
        if of_left and of_right:
            break
    background = rng.getrandbits(32)
    return [
        Example(scene, background, caption, int(scene is owner))
        for caption, owner in ((of_left, left), (of_right, right))
        for scene in (left, right)
    ]


def examples(split: str, count: int, seed: int = 0) -> Iterator[Example]:
    """The first `count` examples of a split ("train", "validation" or "test"), the families in turn."""
    first = SPLITS[split] + seed % 10**9 * 10**8
    made = 0
    while made < count:
        for example in hard_pair(first + made // 4)[: count - made]:
            yield example
            made += 1


def images(split: str, count: int, seed: int = 0) -> Iterator[tuple[Scene, int]]:
    """The first `count` scenes of a split with their backgrounds, the families in turn: each has a twin that differs in one
    thing."""
    first = SPLITS[split] + seed % 10**9 * 10**8
    for number in range(count):
        left, right = hard_pair(first + number // 2)[:2]  # one caption with both scenes
        chosen = (left, right)[number % 2]
        yield chosen.scene, chosen.background


def describe(scene: Scene) -> str:
    """All things of a scene, from left to right."""
    named = [f"a {thing.size} {thing.colour} {thing.shape}" for thing in sorted(scene, key=lambda thing: (thing.x, thing.y))]
    return ", ".join(named[:-1]) + " and " + named[-1]


def ask(rng: random.Random, scene: Scene) -> tuple[str, str]:
    """A question about a scene, of a colour or a number, and its answer."""
    thing = rng.choice(scene)
    alike = len(Caption.matching(scene, (None, None, thing.shape)))
    if alike == 1 and rng.random() < 0.5:
        return ask_colour(thing)
    return ask_number(scene, shape=thing.shape) if rng.random() < 0.5 else ask_number(scene, colour=thing.colour)


def ask_colour(thing: Thing) -> tuple[str, str]:
    """What colour the thing has, which is the only one of its shape."""
    return f"what colour is the {thing.shape}?", thing.colour


def ask_number(scene: Scene, colour: str | None = None, shape: str | None = None) -> tuple[str, str]:
    """How many things of a colour or of a shape there are."""
    noun = plural(shape) if shape else f"{colour} shapes"
    return f"how many {noun} are there?", NUMBERS[len(Caption.matching(scene, (None, colour, shape)))]


def ask_relation(rng: random.Random, scene: Scene) -> tuple[str, str] | None:
    """Whether a relation holds between two things, yes or no; None where a person might hesitate."""
    caption = random_caption(rng, scene, "relation")
    holds = caption.holds(scene)
    (_, *a), (_, *b) = caption.things
    question = f"is the {' '.join(map(str, a))} {caption.relation} the {' '.join(map(str, b))}?"
    return None if holds is None else (question, "yes" if holds else "no")


def ask_everything(rng: random.Random, scene: Scene, relations: int = 2) -> list[tuple[str, str]]:
    """All questions that `ask` may ask about a scene, and up to `relations` of relations."""
    shapes, colours = dict.fromkeys(t.shape for t in scene), dict.fromkeys(t.colour for t in scene)
    alone = [t for t in scene if len(Caption.matching(scene, (None, None, t.shape))) == 1]
    asked = [ask_colour(thing) for thing in alone]
    asked += [ask_number(scene, shape=shape) for shape in shapes] + [ask_number(scene, colour=colour) for colour in colours]
    related = (ask_relation(rng, scene) for _ in range(4 * relations))
    return asked + list(dict.fromkeys(found for found in related if found))[:relations]


def render(scene: Scene, background: int) -> Image.Image:
    """The scene as an RGB image of IMAGE_SIZE px on a side."""
    noise = np.random.default_rng(background)
    base = noise.uniform(60, 120, 3)
    ramp = np.linspace(-1, 1, IMAGE_SIZE)
    tilt = noise.uniform(-18, 18, (2, 3))
    texture = base + ramp[:, None, None] * tilt[0] + ramp[None, :, None] * tilt[1]
    texture = texture + noise.normal(0, 8, (IMAGE_SIZE, IMAGE_SIZE, 1))
    image = Image.fromarray(texture.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for thing in scene:
        _draw(draw, thing)
    return image


def _draw(draw: ImageDraw.ImageDraw, thing: Thing) -> None:
    x, y, r, fill = thing.x, thing.y, SIZES[thing.size], COLOURS[thing.colour]
    box = (x - r, y - r, x + r, y + r)
    if thing.shape == "circle":
        draw.ellipse(box, fill=fill)
    elif thing.shape == "ring":
        draw.ellipse(box, outline=fill, width=max(2, r // 3))
    elif thing.shape == "square":
        draw.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=fill)
    elif thing.shape == "cross":
        w = r / 3
        draw.rectangle((x - w, y - r, x + w, y + r), fill=fill)
        draw.rectangle((x - r, y - w, x + r, y + w), fill=fill)
    else:
        draw.polygon([(x + r * px, y + r * py) for px, py in _POLYGONS[thing.shape]], fill=fill)


def _star(points: int = 5, inner: float = 0.42) -> list[tuple[float, float]]:
    angles = np.arange(2 * points) * np.pi / points - np.pi / 2
    radii = np.where(np.arange(2 * points) % 2 == 0, 1.0, inner)
    return list(zip(radii * np.cos(angles), radii * np.sin(angles), strict=True))


_POLYGONS: dict[str, list[tuple[float, float]]] = {
    "triangle": [(0, -1), (1, 0.9), (-1, 0.9)],
    "star": _star(),
}
