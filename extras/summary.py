"""python -m extras.summary RUN/results.json ...: tables of several runs as Markdown, and pictures.

The first run, and all that differ from it only in what SAME names, are seeds of one thing: their
tables hold means over them, ± the standard deviation. All other runs get a line for each group of
the same changes. lengths.svg, curve.svg, needle.svg and evolution.svg, the last of the first run,
are written beside the first file.
"""

import json
import pathlib
import sys
from statistics import fmean

from extras import page

# Settings that may differ between the seeds of one thing.
SAME = ("seed", "out", "base", "eval", "device", "methods", "report_prompts", "far_prompts",
        "report_at", "rows", "max_rows")


def load(paths):
    """The results in files, [dict]; each run becomes a seed of its own, since the same seed gives
    other sums on another machine. Raises ValueError for a file that holds none."""
    runs = []
    for number, path in enumerate(paths):
        try:
            run = json.loads(pathlib.Path(path).read_text("utf-8"))
            for row in run["report"]:
                row["seed"] = number
            run["config"]["evolve_on"], run["evolution"]["history"]        # are there
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ValueError(f"{path}: not the results.json of a finished run") from None
        runs.append(run)
    return runs


def grouped(runs):
    """{what they change of the first run's settings: [run]}; "" for the first and its like."""
    groups, first = {}, runs[0]["config"]
    for run in runs:
        own, changed = run["config"], []
        for name in first | own:
            if name not in SAME and own.get(name) != first.get(name):
                changed.append(f"{name} {own.get(name)}")
        groups.setdefault(", ".join(changed), []).append(run)
    return groups


def merged(runs):
    """The rows of `report` of runs that are seeds of one thing. Raises ValueError if they did not
    measure the same: one run's best is not another's."""
    measured = []
    for run in runs:
        measured.append({(row["method"], row["task"], row["length"]) for row in run["report"]})
        if measured[-1] != measured[0]:
            raise ValueError("runs with the same settings report on different methods, tasks or "
                             "lengths; give runs that agree")
    return [row for run in runs for row in run["report"]]


def markdown(title, head, lines):
    """A title and a table of cells, all text, as Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return f"### {title}\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + "\n"


def by_length(rows, cell):
    """(head, lines), cells of text: a line for each method, cell(method, length) for each."""
    lengths, lines = sorted(page.distinct(rows, "length")), []
    for method in page.distinct(rows, "method"):
        cells = [page.looks(method)[0]]
        for length in lengths:
            cells.append(cell(method, length) if page.scores(rows, method, length) else "")
        lines.append(cells)
    return ["method", *(f"{length} tokens" for length in lengths)], lines


def changes(groups):
    """(head, lines), cells of text, a line for each group of runs: NAMM's score, the full cache's,
    and the share of the cache, at each length that any of them reports."""
    rows = {changed: merged(runs) for changed, runs in groups.items()}
    lengths = sorted({row["length"] for own in rows.values() for row in own})
    lines = []
    for changed, own in rows.items():
        cells = [changed or "nothing", str(len(groups[changed]))]
        for length in lengths:
            namm, full = page.scores(own, "namm", length), page.scores(own, "full", length)
            cache = page.scores(own, "namm", length, key="cache")
            if namm:
                cells.append(f"{page.spread(namm)}, {fmean(full):.3f}, {fmean(cache):.3f}")
            else:
                cells.append("")
        lines.append(cells)
    return ["changed", "runs", *(f"{n} tokens: NAMM, full cache, cache" for n in lengths)], lines


def svg(*lines):
    """Lists of panels as an SVG file: each list starts a line, and goes on in the next if it is
    wider than a page."""
    body, left, top, height = "", 0, 0, 0
    for panels in lines:
        for width, tall, inside in panels:
            if left + width > 960:
                left, top, height = 0, top + height + 16, 0
            body += f'<g transform="translate({left} {top})">{inside}</g>'
            left, height = left + width + 20, max(height, tall)
        left, top, height = 0, top + height + 16, 0
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-10 -10 980 {top + 4}" width="980">'
            f'<style>{page.style()}</style><rect class="hollow" x="-10" y="-10" width="980" '
            f'height="{top + 4}"/>{body}</svg>\n')


def pictures(runs, rows):
    """{name of a file: its SVG}; none of what was not measured."""
    evolution = page.legend(["level", "candidates", "best", "mean"])
    files = {"evolution": svg(evolution, page.picture_evolution(runs[0]["evolution"]))}
    if len(page.distinct(rows, "length")) > 1:
        legend = page.legend(page.main_methods(rows))
        files["lengths"] = svg(page.picture_lengths(rows), legend)
    curve = [row for run in runs for row in run.get("curve") or []]
    if curve:
        legend = page.legend(["level", *page.distinct(curve, "method")])
        files["curve"] = svg(legend, page.picture_curve(curve, rows))
    if any(row.get("depths") for row in rows):
        files["needle"] = svg(page.picture_needle(rows))
    return files


def summary(paths):
    """Markdown of the runs in files; the pictures are written beside the first. Raises ValueError
    for files that hold no results, or results that do not go together."""
    runs = load(paths)
    groups = grouped(runs)
    rows = merged(groups[""])
    evolved = runs[0]["config"]["evolve_on"].split(",")

    def score(method, length):
        return page.spread(page.scores(rows, method, length))

    def seconds(method, length):
        return page.ratio(page.scores(rows, method, length, key="seconds"),
                          page.scores(rows, "full", length, key="seconds"))

    text = [markdown("NAMM beside the full cache and the best rule", *page.claims(rows)),
            markdown("Score, mean over all tasks", *by_length(rows, score))]
    for length in sorted(page.distinct(rows, "length")):
        text.append(markdown(f"{length} tokens", *page.table(rows, length, evolved)))
    title = "Seconds for the same prompts, over the full cache's"
    text.append(markdown(title, *by_length(rows, seconds)))
    if len(groups) > 1:
        text.append(markdown("Changes", *changes(groups)))
    text.append("### Evolution, run by run\n")
    for run in groups[""]:
        facts = {name: fact for name, fact in run["evolution"].items() if name != "history"}
        text.append(f"* seed {run['config']['seed']}: {json.dumps(facts)}")
    for name, picture in pictures(groups[""], rows).items():
        (pathlib.Path(paths[0]).parent / f"{name}.svg").write_text(picture, "utf-8")
    return "\n".join(text)


if __name__ == "__main__":
    try:
        if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
            raise ValueError("give it the results.json of one run or more")
        print(summary(sys.argv[1:]))
    except (ValueError, OSError) as error:
        print(f"extras.summary: {error}", file=sys.stderr)
        sys.exit(2)
