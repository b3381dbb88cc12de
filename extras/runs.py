"""What the commands beside the lesson share: a finished run, a table, an end in one line."""

import sys

import evolve


def open_run(folder, options=()):
    """(config, gpt, solution, parts) of the finished run in a folder; options: words of evolve.py's
    command line, such as ["--report_at", "1,4"]. Writes nothing. Raises ValueError, with a line for
    the user, for what cannot be."""
    return open_with_encoding(folder, options)[:4]


def open_with_encoding(folder, options=()):
    """As open_run, and the tokeniser: (config, gpt, solution, parts, encoding)."""
    config, task = evolve.parse(["--show", folder, *options])
    encoding, parts, found = evolve.prepare(config, task)
    for line in found["notes"]:
        print(line)
    return config, found["gpt"], found["namm"], parts, encoding


def run_and_options(line, usage):
    """(RUN, the words after it) of a command line. Raises ValueError when there is no RUN."""
    if not line or line[0].startswith("-"):
        raise ValueError(f"usage: {usage}; the options are those of evolve.py")
    return line[0], line[1:]


def markdown(title, head, lines):
    """A title and a table, of text, as Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return f"\n### {title}\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def command(name, main):
    """Run main(command line); --help prints what the module says of itself. What the user can mend
    ends in one line and exit code 2."""
    if {"-h", "--help"} & set(sys.argv):
        return print(sys.modules["__main__"].__doc__)
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
