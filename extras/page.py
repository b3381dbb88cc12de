"""report.html: a finished run on one page that needs nothing else, and no network.

`write(result)` makes it from what results.json holds; it imports nothing of ours.
Read in this order:
  1. Methods    how each is called and drawn
  2. Tables     cells of text, for this page and for extras/summary.py
  3. Pictures   lists of panels; a panel is (width, height, body of an SVG)
  4. The text   every token, shaded by the share of the heads that kept it
  5. write      the page; its CSS and JavaScript are in page.html
"""

import html
import json
import math
import pathlib
import re
from statistics import fmean, stdev

# --- 1. Methods --------------------------------------------------------------------------------

ROUND, SQUARE = "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0", "M-3.5-3.5h7v7h-7z"
TRIANGLE, DIAMOND = "M0-4.5l4.5 8h-9z", "M0-5l5 5l-5 5l-5-5z"
# (on a light page, on a dark one), apart for the color-blind, too
BLUE, ORANGE, GREY = ("#0072b2", "#58b4ee"), ("#d55e00", "#ff8a3d"), ("#929292", "#b4b4b4")
GREEN, PURPLE, PINK = ("#104c30", "#3ef49a"), ("#510b88", "#9c44a7"), ("#7c0d5d", "#b23470")
BLACK = ("#000000", "#f8f8f8")
# name for a reader, colors, shape of the points, dashes
METHODS = {
    "full": ("Full cache", BLUE, ROUND, ""),
    "ntk": ("Full cache, NTK", BLUE, ROUND, "6 4"),
    "namm": ("NAMM", ORANGE, ROUND, ""),
    "namm_uncapped": ("NAMM, no cap", ORANGE, ROUND, "6 4"),
    "random_vectors": ("NAMM, random vectors", GREY, SQUARE, ""),
    "random_vectors_best": ("NAMM, best of 12 random vectors", GREY, SQUARE, "6 4"),
    "random": ("Random", GREY, TRIANGLE, ""),
    "recent": ("Newest tokens", GREY, TRIANGLE, ""),
    "streaming": ("StreamingLLM", GREY, DIAMOND, "2 4"),
    "h2o": ("H2O", PINK, TRIANGLE, ""),
    "fastgen": ("FastGen", GREY, TRIANGLE, ""),
    "l2": ("L2 norm", GREY, TRIANGLE, ""),
    "tova": ("TOVA", GREEN, DIAMOND, ""),
    "snapkv": ("SnapKV", PURPLE, SQUARE, ""),
    "recent_attention": ("Recent attention", BLACK, SQUARE, ""),
    # lines that are no method
    "level": ("Full cache", BLUE, "", "6 4"),
    "candidates": ("Candidates, mean", GREY, "", ""),
    "best": ("Best candidate", GREEN, "", ""),
    "mean": ("Average vector, on prompts kept apart", ORANGE, ROUND, "")}
NOT_RULES = ("full", "ntk", "namm", "namm_uncapped", "random_vectors",
             "random_vectors_best")
SUFFIXES = {"": "", "pool": ", pooled", "lastlayer": ", last layer first"}


def looks(method):
    """(name, colors, shape, dashes) of a method: "tova+pool" is "TOVA, pooled"."""
    name, _, suffix = method.partition("+")
    shown, *look = METHODS.get(name, (name, GREY, TRIANGLE, ""))
    return shown + SUFFIXES[suffix], *look


def style():
    """The CSS of the pictures, on the page and in files of their own."""
    light = "".join(f".{name}{{color:{own[1][0]}}}" for name, own in METHODS.items())
    dark = "".join(f".{name}{{color:{own[1][1]}}}" for name, own in METHODS.items())
    return ("svg{font:12px system-ui,sans-serif;color:#929292}text{fill:#1b1d21}"
            "text:first-child{font-weight:600}.line{fill:none;stroke:currentColor;stroke-width:2}"
            ".grid{stroke:#8885}.dot{fill:currentColor;stroke:currentColor;stroke-width:1.5}"
            f".hollow{{fill:#fff}}.cell{{fill:#1f77d0}}{light}@media(prefers-color-scheme:dark){{"
            "svg{color:#b4b4b4}text{fill:#e9e9e6}.hollow{fill:#15171a}.cell{fill:#2a7fd0}"
            f"{dark}}}")


# --- 2. Tables ---------------------------------------------------------------------------------

def distinct(rows, key):
    """The values of the rows under a key, each once, in the order of the rows."""
    return list(dict.fromkeys(row[key] for row in rows))


def scores(rows, method, length, tasks=(), key="score"):
    """A method's mean over tasks at a length, for each seed: [float]. tasks: all, if not given."""
    seeds = {}
    for row in rows:
        if row["method"] == method and row["length"] == length:
            if not tasks or row["task"] in tasks:
                seeds.setdefault(row["seed"], []).append(row[key])
    return [fmean(values) for values in seeds.values()]


def spread(values):
    """The mean of the seeds' values and, of several, the standard deviation, as text."""
    if not values:
        return ""
    deviation = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{deviation}"


def ratio(values, others):
    """The ratio of two means, as text; "" if the second is 0."""
    return f"{fmean(values) / fmean(others):.2f}" if fmean(others) else ""


def lead(rows, method, length):
    """NAMM's mean minus a method's, and half of the 95 % interval over prompts, as text."""
    own = [row for row in rows if row["method"] == method and row["length"] == length]
    half = 1.96 * math.sqrt(sum(row["lead_se"] ** 2 for row in own)) / len(own)
    return f"{fmean(row['lead'] for row in own):+.3f} ± {half:.3f}"


def best_rule(rows, lengths):
    """The rule with the highest mean over the lengths, of those reported at each; None if none."""
    means = {}
    for method in distinct(rows, "method"):
        found = [scores(rows, method, length) for length in lengths]
        if method not in NOT_RULES and all(found):
            means[method] = fmean(fmean(values) for values in found)
    return max(means, key=means.get, default=None)


def main_methods(rows):
    """The methods of the pictures, at most five: full cache, NAMM, and the best rule."""
    best, present = best_rule(rows, distinct(rows, "length")), distinct(rows, "method")
    return [m for m in ("full", "ntk", "namm", "namm_uncapped", best) if m in present]


def claims(rows):
    """(head, lines), cells of text. For each length: NAMM beside the full cache at that length,
    beside the full cache at the shortest length, where the GPT is at its best, and beside the
    best rule at that length. A ratio is one of means over tasks and seeds."""
    lengths, lines = sorted(distinct(rows, "length")), []
    methods = [method for method in NOT_RULES if method in distinct(rows, "method")]
    for length in lengths:
        best, namm = best_rule(rows, [length]), scores(rows, "namm", length)
        cells = [str(length)]
        cells += [spread(scores(rows, method, length)) for method in methods]
        cells += [f"{looks(best)[0]} {spread(scores(rows, best, length))}" if best else ""]
        cells += [lead(rows, best, length) if best else ""]
        cells += [f"{fmean(scores(rows, 'namm', length, key='cache')):.3f}"]
        cells += [ratio(namm, scores(rows, "full", at)) for at in (length, lengths[0])]
        lines.append(cells)
    return ["tokens", *(looks(method)[0] for method in methods), "best rule", "NAMM ahead of it",
            "NAMM's cache", "NAMM / full", f"NAMM / full at {lengths[0]}"], lines


def table(rows, length, evolved):
    """(head, lines), cells of text: every method at a length. evolved: tasks NAMM evolved on."""
    rows = [row for row in rows if row["length"] == length]
    tasks, lines = distinct(rows, "task"), []
    others = [task for task in tasks if task not in evolved]
    for method in distinct(rows, "method"):
        cells = [looks(method)[0]]
        cells += [f"{fmean(scores(rows, method, length, [task])):.2f}" for task in tasks]
        cells += [spread(scores(rows, method, length, evolved))]
        cells += [spread(scores(rows, method, length, others)) if others else ""]
        cells += [spread(scores(rows, method, length))]
        cells += [ratio(scores(rows, method, length), scores(rows, "full", length))]
        cells += [f"{fmean(scores(rows, method, length, key='cache')):.3f}"]
        cells += [lead(rows, method, length) if method != "namm" else ""]
        lines.append(cells)
    return ["method", *tasks, "evolved on", "other tasks", "all", "/ full", "cache",
            "NAMM ahead"], lines


# --- 3. Pictures -------------------------------------------------------------------------------

QUARTERS = (0, 0.25, 0.5, 0.75, 1)                                         # ticks of a score


def text(x, y, words, anchor="start"):
    """Words in a picture."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(str(words))}</text>'


def line(method, points):
    """The line of a method through points, (x, y) in pixels."""
    _, _, shape, dashes = looks(method)
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    body = f'<path class="line" stroke-dasharray="{dashes}" d="M{path}"/>'
    dot = "dot hollow" if dashes else "dot"
    for x, y in points if shape else ():
        body += f'<path class="{dot}" transform="translate({x:.1f} {y:.1f})" d="{shape}"/>'
    return f'<g class="{method.partition("+")[0]}">{body}</g>'


def legend(methods):
    """A panel for each method: a piece of its line, and its name."""
    panels = []
    for method in methods:
        name = looks(method)[0]
        body = line(method, [(5, 10), (20, 10), (35, 10)]) + text(44, 14, name)
        width = sum(10 if letter.isupper() else 7 for letter in name)
        panels.append((46 + width, 20, body))
    return panels


def ticks(top):
    """Round numbers from 0 to `top` or a little more: four to seven."""
    step = 10 ** math.floor(math.log10(top or 1)) / 2
    while top / step > 6:
        step *= 2
    return [step * i for i in range(max(1, math.ceil(top / step)) + 1)]


def plot(title, lines, xs, ys, size=(290, 230), log=False):
    """A panel with lines [(method, [(x, y)])]; the axes reach from first to last of their ticks,
    xs and ys. log: the x axis is logarithmic."""
    (width, height), f = size, math.log2 if log else float
    scale_x = (width - 62) / (f(xs[-1]) - f(xs[0]) or 1)
    scale_y = (height - 58) / (ys[-1] - ys[0])

    def place(x, y):
        return 42 + scale_x * (f(x) - f(xs[0])), height - 30 - scale_y * (y - ys[0])

    body = text(0, 13, title)
    for y in ys:
        _, at = place(xs[0], y)
        body += f'<path class="grid" d="M36 {at:.1f}H{width - 14}"/>'
        body += text(30, at + 4, f"{y:g}", "end")
    for x in xs:
        body += text(place(x, ys[0])[0], height - 8, f"{x:g}", "middle")
    for method, points in lines:
        if points:
            body += line(method, [place(*point) for point in points])
    return width, height, body


def picture_lengths(rows):
    """Score against length in tokens, of the main methods: one panel."""
    lengths, lines = sorted(distinct(rows, "length")), []
    for method in main_methods(rows):
        found = [(length, scores(rows, method, length)) for length in lengths]
        lines.append((method, [(length, fmean(values)) for length, values in found if values]))
    return [plot("score by length in tokens", lines, lengths, QUARTERS, (350, 270), log=True)]


def picture_curve(rows, report):
    """Score against slots, a panel for each length. rows: `curve` of the results."""
    slots, panels = [row["slots"] for row in rows], []
    low, high = math.floor(math.log2(min(slots))), math.ceil(math.log2(max(slots)))
    xs = [2 ** power for power in range(low, high + 1)]
    for length in sorted(distinct(rows, "length")):
        full = fmean(scores(report, "full", length))
        lines = [("level", [(xs[0], full), (xs[-1], full)])]
        for method in distinct(rows, "method"):
            points = {}                                                    # {capacity: seeds}
            for row in rows:
                if row["method"] == method and row["length"] == length:
                    points.setdefault(row["capacity"], []).append((row["slots"], row["score"]))
            lines.append((method, sorted(tuple(map(fmean, zip(*own))) for own in points.values())))
        panels.append(plot(f"score by slots, {length} tokens", lines, xs, QUARTERS, log=True))
    return panels


def picture_needle(rows):
    """The share of needles found, a panel for each main method: depth down, length across."""
    needles, panels = [row for row in rows if row.get("depths")], []
    lengths = sorted(distinct(needles, "length"))
    for method in main_methods(rows):
        body = text(0, 13, looks(method)[0])
        body += text(42, 59, "start", "end") + text(42, 171, "end", "end")
        for column, length in enumerate(lengths):
            left = 48 + 50 * column
            body += text(left + 24, 36, length, "middle")
            own = [row for row in needles if row["method"] == method and row["length"] == length]
            for depth, found in enumerate(zip(*(row["depths"] for row in own))):
                found = [share for share in found if share is not None]    # seeds with a needle
                if found:
                    top, share = 42 + 28 * depth, fmean(found)
                    body += (f'<rect class="cell" x="{left}" y="{top}" width="48" height="26" '
                             f'fill-opacity="{0.06 + 0.6 * share:.2f}"/>')
                    body += text(left + 24, top + 17, f"{share:.2f}", "middle")
        panels.append((50 + 50 * len(lengths), 186, body))
    return panels


def picture_evolution(evolution):
    """Fitness, share of the cache kept and step size, by generation: three panels."""
    history, panels = evolution["history"], []
    full, last = evolution["fitness of the full cache"], history[-1]["generation"]
    xs = [tick for tick in ticks(last) if tick == int(tick)]               # whole generations
    shown = {"fitness by generation": {"candidates": "candidates", "best": "best", "mean": "mean"},
             "cache kept": {"candidates": "cache"}, "step size": {"candidates": "sigma"}}
    for title, names in shown.items():
        first = not panels
        lines = [("level", [(xs[0], full), (xs[-1], full)])] if first else []
        for name, key in names.items():
            known = [point for point in history if finite(point.get(key)) is not None]
            lines.append((name, [(point["generation"], point[key]) for point in known]))
        ys = ticks(max([y for _, points in lines for _, y in points], default=1))
        size = (350, 230) if first else (172, 230)
        panels.append(plot(title, lines, xs if first else (0, xs[-1]), ys, size))
    return panels


# --- 4. The text -------------------------------------------------------------------------------

def finite(number):
    """The number in four digits; None for what JSON does not know: NaN, infinities."""
    return float(f"{number:.4g}") if number is not None and math.isfinite(number) else None


def answers(asked):
    """(head, lines), cells of text: the questions, and whether either cache answers them right."""
    lines = []
    for own in asked:
        cells = [own["question"].strip(), own["answer"].strip()]
        for reply in (own["full"], own["namm"]):
            cells.append(("✓ " if reply == own["answer"] else "✗ ") + reply.strip())
        lines.append(cells)
    return ["question", "answer", "from the full cache", "from what NAMM kept"], lines


def spans(example):
    """HTML: every token, and for its shade the share of the heads that kept it."""
    pieces = []
    for token, lives in zip(example["text"], zip(*example["lives"])):
        words = html.escape(token).replace("\n", "↵\n")
        gone = "" if any(lives) else ' class="gone"'
        pieces.append(f'<span{gone} style="--share:{fmean(lives):.2f}">{words}</span>')
    return "".join(pieces)


def for_script(example):
    """JSON of what the script shows of a token in each head: whether it stays, its score, and the
    root of its spectrum in percent of the head's highest. No text: none can end the script."""
    bars = []
    for spectra in example["spectrum"]:                                    # of a head, [n][F]
        top = max(max(spectrum) for spectrum in spectra) or 1
        bars.append([[round(100 * math.sqrt(x / top)) for x in spectrum] for spectrum in spectra])
    shown = {"heads": example["heads"], "bars": bars,
             "lives": [[int(stays) for stays in lives] for lives in example["lives"]],
             "score": [[finite(score) for score in head] for head in example["score"]]}
    return json.dumps(shown)


# --- 5. The page -------------------------------------------------------------------------------

def row(panels, name=""):
    """Panels as HTML, side by side where the screen is wide enough."""
    pictures = [f'<svg viewBox="0 0 {width} {height}" width="{width}">{body}</svg>'
                for width, height, body in panels]
    return f'<div class="row {name}">{"".join(pictures)}</div>'


def html_table(head, lines):
    """Cells of text as HTML. A table that is too wide scrolls in its box."""
    rows = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
    rows += ["".join(f"<td>{html.escape(cell)}</td>" for cell in cells) for cells in lines]
    return f'<div class="wide"><table><tr>{"</tr><tr>".join(rows)}</tr></table></div>'


def tables(result):
    """HTML: all numbers, folded."""
    rows, evolved = result["report"], result["config"]["evolve_on"].split(",")
    settings = result["config"] | result["versions"] | {"seconds": round(result["seconds"])}
    parts = {"NAMM beside the full cache and the best rule": claims(rows)}
    for length in sorted(distinct(rows, "length")):
        parts[f"Every method at {length} tokens"] = table(rows, length, evolved)
    parts["Settings"] = ["setting", "value"], [[name, str(settings[name])] for name in settings]
    return "".join(f"<details><summary>{title}</summary>{html_table(*cells)}</details>"
                   for title, cells in parts.items())


def introduction(rows):
    """HTML: the first picture, and its last numbers in words."""
    longest = max(distinct(rows, "length"))
    last = {method: scores(rows, method, longest) for method in main_methods(rows)}
    order = sorted(last, key=last.get, reverse=True)                       # as the lines end
    share = fmean(scores(rows, "namm", longest, key="cache"))
    return (f'<div class="first">{row(picture_lengths(rows))}{row(legend(order), "legend")}</div>'
            f"<p>At {longest} tokens the full cache scores {fmean(last['full']):.2f}, NAMM "
            f"{fmean(last['namm']):.2f} from {share:.1%} of the tokens.</p>")


def the_text(example):
    """{placeholder: HTML}, what page.html says about an example."""
    options = [f'<option value="{i}">{html.escape(name)}</option>'
               for i, name in enumerate(example["heads"])]
    asked = html_table(*answers(example["asked"])).replace("✓", "<b>✓</b>")
    return {"task": html.escape(example["task"]), "tokens": str(example["length"]),
            "answers": asked, "heads": "".join(options), "text": spans(example),
            "shown": for_script(example)}


def write(result):
    """The page, as HTML. result: what results.json holds; `curve` and `example` may be missing."""
    page = pathlib.Path(__file__).with_name("page.html").read_text("utf-8")
    rows, curve, example = result["report"], result.get("curve"), result.get("example")
    parts = {                                                              # {placeholder: HTML}
        "style": style(), "trained": str(result["config"]["length"]),
        "introduction": introduction(rows), "tables": tables(result),
        "evolution": row(legend(["level", "candidates", "best", "mean"]), "legend")
        + row(picture_evolution(result["evolution"]), "small")}
    if example:
        parts |= the_text(example)
    if curve:
        parts["curve"] = row(legend(["level", *distinct(curve, "method")]), "legend")
        parts["curve"] += row(picture_curve(curve, rows))
    if any(own.get("depths") for own in rows):
        parts["needle"] = row(picture_needle(rows))
    for section in ("text", "curve", "needle"):
        if section not in parts:
            page = re.sub(f'<section id="{section}">.*?</section>', "", page, flags=re.DOTALL)
    return re.sub(r"\[\[(\w+)\]\]", lambda found: parts[found[1]], page)
