#!/usr/bin/env bash
# Expected: torch.save to a disk that is full raises OSError, errno 28, as any writing in Python.
# Happens (torch 2.13.0, Linux): given an open file it does; given the file's name it raises
# RuntimeError without an errno: "basic_ios::clear: iostream error" for a small checkpoint, "[enforce
# fail at inline_container.cc...] unexpected pos" for a large one. The disk is not mentioned.
# Matters: a training loop that waits, or clears old checkpoints, on OSError dies instead, and its
# message sends people after a damaged file. Save to an open file, or to memory first.
# Seen 2026-11-30 with /dev/full: RuntimeError twice by name, OSError 28 twice by open file.
# One minute, 1 GB in a temporary folder.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$dir/venv/bin/python" - <<'PY'
import sys

import torch

FULL = "/dev/full"  # every write to it fails as on a full disk


def error(save):
    """The kind of error that saving raises, its errno and message; prints them."""
    try:
        save()
    except Exception as raised:
        found = type(raised).__name__, getattr(raised, "errno", None)
        print(*found, str(raised)[:70].replace("\n", " "))
        return found
    sys.exit("CHANGED: saving to a full disk raises nothing")


def to_open_file(state):
    """Save to a file that is open already."""
    with open(FULL, "wb") as file:
        torch.save(state, file)


print("torch", torch.__version__)
by_name, by_file = [], []
for size in (10, 10_000_000):
    state = {"weights": torch.zeros(size)}
    by_name.append(error(lambda: torch.save(state, FULL)))
    by_file.append(error(lambda: to_open_file(state)))
if by_name != [("RuntimeError", None)] * 2 or by_file != [("OSError", 28)] * 2:
    sys.exit("CHANGED: a full disk is another error now")
PY
