"""python -m pytest extras/test_page.py: report.html in a browser, tables against sums by hand."""

import ast
import html
import json
import math
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from extras import page, summary

# {method: {length: (task "kv", task "needle")}}; NAMM evolved on kv. Of the rules tova is the best,
# h2o finds more needles, and random has the highest score of all but is reported at 64 only.
SCORES = {
    "full": {64: (0.6, 1.0), 256: (0.0, 0.1)}, "ntk": {64: (0.6, 1.0), 256: (0.2, 0.4)},
    "namm": {64: (0.5, 0.9), 256: (0.4, 0.8)}, "random": {64: (0.9, 0.9)},
    "h2o+pool": {64: (0.0, 0.5), 256: (0.0, 0.3)}, "tova": {64: (0.3, 0.4), 256: (0.1, 0.2)}}
TEXT = ["</script>", "<!--<script>", " a&b", "\n", "\n", " [[shown]]"]     # spoils a careless page


def reported(scores, more, seed):
    """The rows of `report`: two tasks, a needle at all depths but the second."""
    rows = []
    for method, lengths in scores.items():
        for length, pair in lengths.items():
            for task, score in zip(("kv", "needle"), pair):
                score += more if method == "namm" else 0
                rows.append(dict(method=method, task=task, length=length, score=score, logprob=-1.0,
                                 relative=None, cache=1.0 if method == "full" else 0.25, seed=seed,
                                 lead=0.02, lead_se=0.03, seconds=2.0 if method == "namm" else 1.0))
                if task == "needle":
                    rows[-1]["depths"] = [score, None, 0.5, 0.25, 0.0]
    return rows


def made(seed=0, more=0.0, scores=SCORES, **config):
    """A small result by hand. more: is added to each of NAMM's scores. One score and one fitness
    are not a number."""
    history = [dict(generation=0, sigma=0.5, mean=0.1),
               dict(generation=1, sigma=0.4, candidates=math.nan, best=0.6, cache=0.2),
               dict(generation=2, sigma=0.3, candidates=0.5, best=0.8, cache=0.1, mean=0.7)]
    curve = []
    for method in ("namm", "tova"):
        for slots in (4, 16):
            curve.append(dict(method=method, length=64, capacity=slots, slots=float(slots),
                              score=0.5, seed=seed))
    example = dict(
        task="kv", length=8, text=list(TEXT), heads=["layer 0", "layer 1"],
        asked=[dict(question="\nx:", answer=" y", full=" z", namm=" y")],
        lives=[[True, False, False, True, False, True], [True, False, True, False, False, True]],
        score=[[1.5, None, -0.25, 0.5, -1.0, math.nan], [0.5] * 6],
        spectrum=[[[0.01 * token] * 17 for token in range(6)], [[0.0] * 17] * 6])
    return dict(config=dict(length=64, evolve_on="kv", capacity=16, seed=seed) | config,
                versions=dict(torch="2"), seconds=1.0, report=reported(scores, more, seed),
                evolution={"fitness of the full cache": 0.6, "history": history},
                curve=curve, example=example)


@pytest.fixture(scope="module")
def browser():
    """browser(page, folder) -> what a headless browser makes of a page, as HTML."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if not found:
        pytest.skip("no browser: report.html was not opened")

    def opened(text, folder):
        path = folder / "report.html"
        path.write_text(text, "utf-8")
        command = [found, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=60)
        return done.stdout
    return opened


def doing(text, script):
    """A page that does something when it is loaded."""
    return text.replace("</body>", f"<script>{script}</script></body>")


def shares(text):
    """The shades in HTML."""
    return [float(share) for share in re.findall(r"--share: ?([\d.]+)", text)]


TOUCH = 'spans[%d].dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));'


def test_the_page_in_a_browser(browser, tmp_path):
    """Every token is there, painted by the share of the heads that kept it, and tells of itself
    when it is touched. Catches: text that ends or swallows the script, or is taken for a
    placeholder; a script that fails; NaN."""
    dom = browser(doing(page.write(made()), TOUCH % 5), tmp_path)
    box = dom.split('id="textbox"')[1].split("</div>")[0]
    spans = re.findall(r"<span([^>]*)>(.*?)</span>", box, flags=re.DOTALL)
    assert [html.unescape(words).replace("↵", "") for _, words in spans] == TEXT
    assert [shares(own) for own, _ in spans] == [[1], [0], [0.5], [0.5], [0], [1]]
    assert ["gone" in own for own, _ in spans] == [False, True, False, False, True, False]
    first, second = dom.split('id="token"')[1].split("<script>")[0].split("layer 1")
    assert "stays, never judged" in first and "stays, score 0.50" in second
    assert first.count("<rect") == second.count("<rect") == 17
    assert first.count('height="40"') == 17 and 'height="40"' not in second    # the highest, and 0
    shown = re.sub("<script>.*?</script>", "", dom, flags=re.DOTALL)
    assert "NaN" not in dom and "undefined" not in shown and shown.count("<svg") > 15
    assert "<b>✓</b> y" in shown and "✗ z" in shown


def test_a_chosen_head_paints_alone(browser, tmp_path):
    """Catches: a choice that does nothing, or shows another head."""
    script = 'choice.value = "1"; choice.dispatchEvent(new Event("change"));' + TOUCH % 0
    dom = browser(doing(page.write(made()), script), tmp_path)
    box, told = dom.split('id="textbox"')[1].split('id="token"')
    told = told.split("<script>")[0]
    assert shares(box) == [1, 0, 1, 0, 0, 1]
    assert "score 0.50" in told and "layer 1" in told and "layer 0" not in told


def test_no_page_is_wider_than_a_phone(browser, tmp_path):
    """At 390 pixels, with all tables open, only tables scroll sideways, in their boxes, and no
    picture shrinks until its words are small. Catches: a table outside a box, a word that is too
    long, more pictures side by side than fit."""
    lengths = {64 * 2 ** power: (0.5, 0.5) for power in range(5)}
    result = made(scores={"full": lengths, "namm": lengths}, corpus="x" * 200)
    result["example"]["text"][2] = "y" * 300
    result["example"]["asked"][0]["namm"] = "z" * 300
    text = page.write(result).replace("<details>", "<details open>")
    frame = doing(f'<body><iframe width="390" srcdoc="{html.escape(text)}"></iframe></body>', """
        onload = () => {
          const page = document.querySelector("iframe").contentDocument.documentElement;
          const scales = [...page.querySelectorAll("svg")].map(
            svg => svg.getBoundingClientRect().width / svg.getAttribute("width"));
          document.title = `${page.scrollWidth} ${page.clientWidth} ${Math.min(...scales)}`;
        }""")
    title = re.search("<title>(.*)</title>", browser(frame, tmp_path))[1]
    needed, given, scale = map(float, title.split())
    assert 370 < given <= 390 and needed == given and scale > 0.9


def test_what_was_not_measured_is_left_out():
    """Without curve, example, needle and rules the rest stands. Catches: a part that needs another,
    an empty section, a ratio to 0."""
    result = made(scores={"full": {64: (0.0, 0.0)}, "namm": {64: (0.5, 0.7)}})
    del result["example"], result["curve"]
    for row in result["report"]:
        row.pop("depths", None)
    text = page.write(result)
    assert "<script" not in text and "[[" not in text and "nan" not in text.lower()
    assert re.findall("<h2>(.*?)</h2>", text) == ["Evolution", "All numbers"]
    assert page.write(json.loads(json.dumps(result)) | {"example": None, "curve": []}) == text


def test_the_page_needs_nothing_else():
    """Catches: an import of the program, a file or a font from the network."""
    names = set()
    for node in ast.walk(ast.parse(pathlib.Path(page.__file__).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
    assert names <= sys.stdlib_module_names
    for outside in ("http", "src=", "href=", "@import", "url("):
        assert outside not in page.write(made())


def test_the_tables_by_hand():
    """Two seeds, NAMM 0.2 better in the second. Catches: a mean or a deviation over the wrong rows,
    a mean of ratios, standard errors that are added, a rule that is best where it was reported."""
    rows = made(0)["report"] + made(1, more=0.2)["report"]
    head, lines = page.table(rows, 64, ["kv"])
    cells = {line[0]: dict(zip(head, line)) for line in lines}
    # kv: 0.5 and 0.7, needle: 0.9 and 1.1; the deviation of two seeds is 0.2 / sqrt(2)
    assert cells["NAMM"] == {
        "method": "NAMM", "kv": "0.60", "needle": "1.00", "evolved on": "0.600 ± 0.141",
        "other tasks": "1.000 ± 0.141", "all": "0.800 ± 0.141", "/ full": "1.00",
        "cache": "0.250", "NAMM ahead": ""}
    # four rows: 1.96 * sqrt(4 * 0.03 ** 2) / 4
    assert cells["Full cache"]["NAMM ahead"] == "+0.020 ± 0.029"
    assert cells["H2O, pooled"]["/ full"] == "0.31" and len(lines) == 6
    head, lines = page.table(rows, 64, ["kv", "needle"])
    assert [line[head.index("other tasks")] for line in lines] == [""] * 6

    head, lines = page.claims(rows)
    first, second = (dict(zip(head, line)) for line in lines)
    assert first["tokens"] == "64" and first["best rule"] == "Random 0.900 ± 0.000"
    assert second["tokens"] == "256" and second["best rule"] == "TOVA 0.150 ± 0.000"
    # at 256 NAMM has (0.6 + 0.8) / 2, the full cache 0.05, and at 64 the full cache has 0.8
    assert second["NAMM"] == "0.700 ± 0.141" and second["NAMM / full"] == "14.00"
    assert second["NAMM / full at 64"] == "0.88"
    assert page.main_methods(rows) == ["full", "ntk", "namm", "tova"]
    assert page.ratio([0.5], [0.0, 0.0]) == ""


def test_points_stand_where_they_belong():
    """On a logarithmic axis 2 is half way from 1 to 4, and scores grow upwards. Catches: a linear
    axis, swapped axes, a highest value beyond the ticks."""
    points = [(1, 0.0), (2, 1.0), (4, 0.5)]
    _, _, body = page.plot("title", [("namm", points)], [1, 4], [0, 1], log=True)
    found = re.findall(r"translate\(([\d.]+) ([\d.]+)\)", body)
    (x0, y0), (x1, y1), (x2, y2) = [(float(x), float(y)) for x, y in found]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and x0 < x1
    assert y0 - y2 == pytest.approx(y2 - y1, abs=0.2) and y1 < y0
    for top, want in [(60, [0, 10, 20, 30, 40, 50, 60]), (1.05, [0, 0.5, 1, 1.5]), (0, [0, 0.5]),
                      (0.56, [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), (8, [0, 2, 4, 6, 8])]:
        assert page.ticks(top) == pytest.approx(want)


def test_needles_by_hand():
    """The mean of the seeds that had a needle at a depth. Catches: None counted as 0, 0 left out,
    depth and length swapped, another rule than in the first picture."""
    rows = made(0)["report"] + made(1, more=0.2)["report"]
    tova = next(row for row in rows[::-1] if row["method"] == "tova")      # at 256, of the second
    tova["depths"][1] = 0.75
    panels = page.picture_needle(rows)
    said = [re.findall(">([^<>]+)</text>", body) for _, _, body in panels]
    assert [words[0] for words in said] == ["Full cache", "Full cache, NTK", "NAMM", "TOVA"]
    assert said[2][3:] == ["64", "1.00", "0.50", "0.25", "0.00",
                           "256", "0.90", "0.50", "0.25", "0.00"]
    assert said[3][8:] == ["256", "0.20", "0.75", "0.50", "0.25", "0.00"]


def test_summary_by_hand(tmp_path):
    """Two runs of the same seed, and one with another limit. Catches: runs in the wrong group, two
    machines' runs taken for one, a mean over the wrong rows, a curve that nobody measured."""
    paths = [tmp_path / name for name in ("a", "b", "c")]
    runs = [made(), made(more=0.2, out="elsewhere"), made(more=0.1, capacity=8)]
    for path, run in zip(paths, runs):
        path.write_text(json.dumps(run | {"curve": []}))
    text = summary.summary(paths)
    # NAMM at 64: 0.7, 0.9 and, with the other limit, 0.8; at 256: 0.6, 0.8 and 0.7
    assert "| nothing | 2 | 0.800 ± 0.141, 0.800, 0.250 | 0.700 ± 0.141, 0.050, 0.250 |" in text
    assert "| capacity 8 | 1 | 0.800, 0.800, 0.250 | 0.700, 0.050, 0.250 |" in text
    assert "| NAMM | 0.800 ± 0.141 | 0.700 ± 0.141 |" in text          # the mean over all tasks
    assert "| NAMM | 2.00 | 2.00 |" in text                            # seconds
    assert "| Random | 0.900 ± 0.000 |  |" in text
    drawn = {path.stem for path in tmp_path.glob("*.svg")}
    assert drawn == {"evolution", "lengths", "needle"}
    paths[0].write_text(json.dumps(made()))
    assert "Changes" not in summary.summary(paths[:1])
    for name in ("curve", "lengths", "needle", "evolution"):
        assert "nan" not in (tmp_path / f"{name}.svg").read_text().lower()


def test_summary_of_what_cannot_be(tmp_path):
    """A line that says why, and exit code 2. Catches: a traceback, numbers from runs that did not
    measure the same."""
    paths = [tmp_path / "none", tmp_path / "less"]
    for content in ("", "[1]", "{}", '{"report": [1]}', '{"report": [], "config": {}}'):
        paths[0].write_text(content)
        with pytest.raises(ValueError, match="none: not the results.json of a finished run"):
            summary.summary(paths[:1])
    command = [sys.executable, "-m", "extras.summary", paths[0]]
    root = pathlib.Path(page.__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 2 and done.stderr.startswith("extras.summary: ")
    assert done.stderr.count("\n") == 1 and done.stdout == ""
    less = made(scores={"full": {64: (1, 1)}, "namm": {64: (1, 1)}})
    for path, run in zip(paths, (made(), less)):
        path.write_text(json.dumps(run))
    with pytest.raises(ValueError, match="runs that agree"):
        summary.summary(paths)
