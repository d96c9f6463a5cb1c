"""Reports as pages: what a browser makes of them, and that every figure is the one of the JSON."""

import json
import math
import re
import shutil

import pytest
import tiny
from browser import Browser, find_browser
from typer.testing import CliRunner

import comp_cli
from comp_cli.cli.app import app
from comp_cli.report.analyze import LayerDiagnosis, LayerInfluence
from comp_cli.report.interference import conclusions
from comp_cli.report.page.charts import squares
from comp_cli.report.page.drawing import nice_ticks
from comp_cli.report.page.figures import pointer
from comp_cli.report.page.pages import analyze_page, prune_page, sweep_page

FEW = {"num_samples": 8, "batch_size": 4, "text_tokens": 12, "device": "cpu"}
NEEDS = pytest.mark.skipif(find_browser() is None, reason="there is no Chromium here")
PAGES = ("analyze", "compact", "prune", "sweep", "decoder", "tokens")
HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)>&amp;\"'" + "W" * 300


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tiny_folder, compact_folder, tmp_path_factory):
    """Name -> the page and the document that it must agree with, read from elsewhere."""
    place = tmp_path_factory.mktemp("pages")
    found = {"prune": (compact_folder / "report.html", json.loads((compact_folder / "comp_report.json").read_text()))}
    report = comp_cli.analyze(tiny_folder, html=place / "analyze.html", **FEW)
    found["analyze"] = (place / "analyze.html", report.to_json())
    report = comp_cli.analyze(compact_folder, html=place / "compact.html")
    found["compact"] = (place / "compact.html", report.to_json())
    how = FEW | {"method": "joint", "eval_samples": 8}
    comp_cli.prune(tiny_folder, ratio=[0.2, 0.3, 0.4], output=place / "sweep", **how)
    found["sweep"] = (place / "sweep" / "tradeoff.html", json.loads((place / "sweep" / "comp_sweep.json").read_text()))
    llava = tiny.write("llava", place / "llava")
    report = comp_cli.analyze(llava, html=place / "decoder.html")
    found["decoder"] = (place / "decoder.html", report.to_json())
    comp_cli.prune(llava, token_stages="1:20,2:7", output=place / "tokens")
    found["tokens"] = (place / "tokens" / "report.html", json.loads((place / "tokens" / "comp_report.json").read_text()))
    return found


# Figures -------------------------------------------------------------------------------------------------------------

FIGURES = """[...document.querySelectorAll('.figure')].map(one => ({
    path: one.dataset.path ?? null, how: one.dataset.as ?? null, of: one.dataset.of ?? null,
    value: JSON.parse(one.dataset.value), text: one.textContent}))"""
MADE = {
    "sum": lambda *terms: sum(terms),
    "mean": lambda *terms: sum(terms) / len(terms),
    "share": lambda part, whole: part / whole,
    "rest": lambda part, whole: 1 - part / whole,
    "change": lambda before, after: after / before - 1,
    "difference": lambda before, after: after - before,
    "length": len,
}
UNITS = {"k": 1e3, "M": 1e6, "G": 1e9, "KiB": 2**10, "MiB": 2**20, "%": 1e-2, "points": 1e-2, "": 1, "pairs": 1, "B": 1}


def looked_up(document, path):
    for step in path.split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        document = document[int(step) if isinstance(document, list) else step]
    return document


def expected(document, figure):
    if figure["path"] is not None:
        return looked_up(document, figure["path"])
    if figure["how"] == "length":
        return len(looked_up(document, figure["of"]))
    terms = [
        sum(looked_up(document, path) for path in term) if isinstance(term, list) else looked_up(document, term)
        for term in json.loads(figure["of"])
    ]
    return MADE[figure["how"]](*terms)


def read(text):
    """A number as it is shown, and half a unit of its last digit."""
    match = re.fullmatch(r"([+-]?\d+)(?:\.(\d+))?(?:e([+-]\d+))? ?(.*)", text.replace(",", "").replace("−", "-"))
    assert match, text
    whole, decimals, power, unit = match.groups()
    scale = UNITS["" if unit == "times less" else unit] * 10 ** int(power or 0)
    return float(f"{whole}.{decimals or 0}") * scale, 0.5 * 10 ** -len(decimals or "") * scale


@NEEDS
@pytest.mark.parametrize("name", PAGES)
def test_every_figure_that_is_shown_is_that_of_the_report(browser, pages, name):
    path, document = pages[name]
    page = browser.open(path)
    figures = page.run(FIGURES)
    assert len(figures) > 15
    for figure in figures:
        wanted = expected(document, figure)
        assert figure["value"] == pytest.approx(wanted, rel=1e-12), figure
        shown, half = read(figure["text"])
        digits = 10 ** (math.floor(math.log10(abs(wanted))) - 3) if wanted else 0  # four digits are shown of long numbers
        assert abs(shown - wanted) <= max(half * 1.001, digits), figure
    inside = json.loads(page.run("document.getElementById('report').textContent"))
    assert inside.items() <= document.items() or inside == {key: document[key] for key in inside}


@NEEDS
@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_loaded_and_nothing_is_complained_of(browser, pages, name):
    path, _ = pages[name]
    page = browser.open(path)
    assert page.requests == [path.resolve().as_uri()]
    assert page.messages == []
    assert page.run("[...document.scripts].map(one => one.type)") == ["application/json"]
    sections = page.run("[...document.querySelectorAll('h2')].map(one => one.textContent)")
    assert len(sections) == len(set(sections)) >= 1
    unnamed = "[...document.querySelectorAll('svg[role=img]')].filter(one => !one.getAttribute('aria-label')).length"
    assert page.run(unnamed) == 0


# Looks ---------------------------------------------------------------------------------------------------------------

CONTRAST = """(() => {
  const numbers = color => color.match(/[\\d.]+/g).map(Number);
  const light = color => numbers(color).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = one => {
    for (; one; one = one.parentElement) {
      const color = getComputedStyle(one).backgroundColor;
      if ((numbers(color)[3] ?? 1) > 0) return color;
    }
    return 'rgb(255, 255, 255)';
  };
  const cell = (one, page) => {  // a number in a heat map, on the square before it
    const square = one.previousElementSibling, style = getComputedStyle(square);
    const share = square.getAttribute('fill-opacity') * style.opacity, over = numbers(style.fill), under = numbers(page);
    return `rgb(${over.map((v, i) => share * v + (1 - share) * under[i])})`;
  };
  const found = [];
  for (const one of document.querySelectorAll('body *')) {
    if (one.closest('script') || ![...one.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    const style = getComputedStyle(one), drawn = one.namespaceURI.endsWith('svg');
    if (one.tagName === 'title') continue;
    const under = one.matches('.cell') ? cell(one, behind(one)) : behind(one);
    const pair = [light(drawn ? style.fill : style.color), light(under)].sort((a, b) => b - a);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (ratio < 4.5) found.push([one.tagName, one.className.baseVal ?? one.className, one.textContent.slice(0, 30), ratio]);
  }
  return found;
})()"""
OPEN = "document.querySelectorAll('details').forEach(one => { one.open = true })"


@NEEDS
@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_fits_phone_and_desk_and_can_be_read(browser, pages, name, dark):
    page = browser.open(pages[name][0], dark=dark)
    page.run(OPEN)
    for width in (360, 1280):
        page.resize(width)
        assert page.run("document.documentElement.scrollWidth") <= width
    background = page.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 200) == dark
    assert page.run(CONTRAST) == []


@NEEDS
def test_hostile_names_and_words_stay_text(browser, pages, tmp_path):
    for name, make, field in (
        ("prune", prune_page, "base_model"),
        ("analyze", analyze_page, "model"),
        ("sweep", sweep_page, "base_model"),
    ):
        document = pages[name][1] | {field: HOSTILE, "architecture": HOSTILE, "warnings": [HOSTILE], "command": HOSTILE}
        if name == "prune":
            document = with_text(document, [HOSTILE, "b"], (1, [1]))
        (tmp_path / "page.html").write_text(make(document, *([[None]] if name == "prune" else [])), encoding="utf-8")
        page = browser.open(tmp_path / "page.html", width=360)
        page.run(OPEN)
        assert page.run("document.querySelector('h1').textContent") == HOSTILE
        assert page.run("document.scripts.length") == 1 and page.run("document.images.length") == 0
        assert page.run("document.title").startswith(HOSTILE) and page.messages == []
        assert page.run("document.documentElement.scrollWidth") <= 360
        assert json.loads(page.run("document.getElementById('report').textContent"))[field] == HOSTILE


# What it says --------------------------------------------------------------------------------------------------------


def test_a_compact_folder_holds_its_page_among_the_files_that_are_hashed(compact_folder, tiny_folder, pages):
    path, document = pages["prune"]
    assert "report.html" in document["files"] and "tradeoff.html" in pages["sweep"][1]["files"]
    text = path.read_text()
    assert str(compact_folder.parent) not in text and str(tiny_folder.parent) not in text
    assert not re.search(r'(?:src|href)="(?!data:|#|ratio-)', text)
    assert 'src="http' not in text and "@import" not in text and "url(" not in text
    for name in ("sweep", "tokens"):
        assert str(pages[name][0].parents[1]) not in pages[name][0].read_text()


def test_the_same_run_makes_the_same_page(tiny_folder, compact_folder, tmp_path):
    sizes = {"num_samples": 8, "eval_samples": 8, "text_tokens": 12}
    place = compact_folder.with_name("again")  # as far from the dense model: a relative path to it is in the report
    comp_cli.prune(tiny_folder, ratio=0.7, output=place, method="joint", device="cpu", **sizes)
    assert (place / "report.html").read_bytes() == (compact_folder / "report.html").read_bytes()
    shutil.rmtree(place)


def test_veils_lie_on_the_patches_that_left(pages):
    path, document = pages["prune"]
    streams = [stream for sample in document["kept_samples"] for stream in sample["streams"] if stream["kind"] == "image"]
    veils = [set(covered(drawn, 6)) for drawn in re.findall(r'<path class="veil" d="([^"]*)"', path.read_text())]
    gone = [set(range(one["tokens"])) - set(layer["kept"]) for one in streams for layer in one["layers"]]
    assert veils == gone and any(gone)


def covered(path, columns):
    """Squares that a path of `squares` covers, read by its numbers."""
    for x, y, run in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", path):
        yield from (int(y) * columns + int(x) + step for step in range(int(run)))


def with_text(document, words, *layers):
    """A document with one sample, a text whose words leave: (layer, those that are left)."""
    kept = [{"layer": layer, "kept": left, "merged": 0} for layer, left in layers]
    stream = {"stream": "language", "tower": "language", "kind": "text", "at": "behind", "layers_of_tower": 4, "grid": None}
    stream |= {"tokens": len(words), "words": words, "layers": kept}
    return document | {"kept_samples": [{"text": " ".join(words), "streams": [stream], "said": "yes"}]}


def test_words_are_struck_out_at_the_layer_where_they_leave(pages):
    text = prune_page(with_text(pages["prune"][1], ["a", "red", "circle", "."], (0, [1, 2, 3]), (2, [1, 2])), [None])
    assert re.findall(r"<s>(.*?)</s><sub>layer (\d+)</sub>", text) == [("a", "0"), (".", "2")]
    assert re.findall(r"<span>(red|circle|a|\.)</span>", text) == ["red", "circle"]


def test_plans_that_were_judged_on_one_half_are_named(compact_folder):
    """Where others were judged on both: of a run that judges on one half only nothing is said."""
    document = json.loads((compact_folder / "comp_report.json").read_text())
    plan = {"tokens": {}, "ratio": 0.3}
    mixed = [plan | {"loss": 0.1, "halves": 2}, plan | {"loss": 0.3, "halves": 1}, plan | {"loss": None}]
    page = prune_page(document | {"compared": mixed}, [None] * 8)
    assert page.count("on one half of the pairs)") == 2  # the point and the row of the second
    assert "was not judged on the other" in page
    assert "one half" not in prune_page(document | {"compared": mixed[1:]}, [None] * 8)


def test_squares_beside_each_other_are_one_outline_and_none_goes_around_a_corner():
    assert squares([0, 1, 5, 6, 7], 6) == "M0 0h2v1h-2zM5 0h1v1h-1zM0 1h2v1h-2z"


def test_ticks_are_round_and_hold_what_is_shown():
    assert nice_ticks(0, 68e6) == [0, 20e6, 40e6, 60e6, 80e6]
    assert nice_ticks(0.93, 0.98) == [0.92, 0.94, 0.96, 0.98] or nice_ticks(0.93, 0.98)[0] <= 0.93
    for low, high in ((0, 0), (1, 1), (-3, 5), (0.1, 0.100001), (0, 1e12)):
        ticks = nice_ticks(low, high)
        assert ticks[0] <= low and high <= ticks[-1] and 2 <= len(ticks) <= 8 and ticks == sorted(set(ticks))


def test_a_pointer_says_any_key():
    assert pointer(("metrics", "a/b~c", 0)) == "/metrics/a~1b~0c/0"


def diagnosis(overlap, strong, chance=0.3):
    influence = LayerInfluence([0], changed_by_least=0.1, changed_by_all=0.1, correlation_without_least=1, strong=strong)
    return LayerDiagnosis("vision", 0, {"attention": overlap, "ffn": overlap}, chance, influence)


@pytest.mark.parametrize(
    ("overlap", "strong", "verdicts"),
    [
        (0.3, 1.0, ["interferes", "interferes"]),  # as by chance; every head counts
        (0.79, 0.2, ["separate", "separate"]),  # 0.7 of the way from 0.3 to 1
        (0.58, 0.4, ["unclear", "unclear"]),  # 0.4 of the way
    ],
)
def test_what_follows_from_the_findings(overlap, strong, verdicts):
    found = conclusions([diagnosis(overlap, strong), diagnosis(overlap, strong)], 0.3)
    assert [one.verdict for one in found] == verdicts and [one.finding for one in found] == ["tokens", "heads"]
    tokens, heads = found
    assert tokens.judged == pytest.approx((overlap - 0.3) / 0.7) and heads.judged == strong
    assert f"{100 * overlap:.1f} % are among the top tokens" in tokens.sentence and tokens.sentence.startswith("vision: ")


# Where it is written -------------------------------------------------------------------------------------------------


def test_a_page_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    def run(*given):
        return CliRunner().invoke(app, ["analyze", "no-such-model", *map(str, given)])

    (tmp_path / "mine.html").write_text("mine")
    for given, said in (
        (("--html", tmp_path / "nowhere" / "page.html"), "no such folder"),
        (("--html", tmp_path), "is no file"),
        (("--html", tmp_path / "mine.html"), "exists"),
        (("--html", tmp_path / "mine.html", "--overwrite"), "no page that comp wrote"),
    ):
        result = run(*given)
        assert result.exit_code == 2 and said in result.stderr, result.stderr
    assert (tmp_path / "mine.html").read_text() == "mine"


def test_a_page_of_comp_is_replaced_when_asked_and_quiet_says_where_it_is(tiny_folder, tmp_path):
    place = tmp_path / "page.html"
    words = [word for name, value in FEW.items() for word in ("--" + name.replace("_", "-"), str(value))]
    given = ["analyze", str(tiny_folder), "--html", str(place), *words]
    first = CliRunner().invoke(app, [*given, "--quiet"])
    assert (first.exit_code, first.stdout) == (0, f"{place}\n"), first.output
    before = place.read_bytes()
    assert CliRunner().invoke(app, given).exit_code == 2
    again = CliRunner().invoke(app, [*given, "--overwrite"])
    assert again.exit_code == 0 and f"Wrote {place}" in " ".join(again.stdout.split()), again.output
    assert place.read_bytes() == before
