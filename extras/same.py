"""python -m extras.same REVISION [OTHER]: do two revisions compute the same, bit for bit?

Takes the program out of git at both revisions (OTHER: HEAD, if not given) into a temporary folder,
runs both with the same seed, and compares GPT, vector and scores. A line each; exit code 1 if
something differs.
"""

import io
import json
import pathlib
import subprocess
import sys
import tarfile
import tempfile

import torch

from extras import runs

RUNS = {
    "smoke": ["--preset", "smoke"],
    "learns": ["--preset", "cpu", "--steps", "250", "--length", "128", "--generations", "4",
               "--report_at", "1,4", "--report_prompts", "4", "--methods", "namm,full"]}
OLDER = {"namm_free": "namm_uncapped", "attended": "recent_attention",  # names of older revisions
         "_shared": "+pool", "_last": "+lastlayer"}


def take_out(revision, folder):
    """The files of a revision of the repository that one stands in, in a new folder."""
    done = subprocess.run(["git", "archive", revision], capture_output=True)
    if done.returncode:
        raise ValueError(f"git archive {revision}: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as files:
        files.extractall(folder, filter="data")


def run(folder, out, options):
    """The program in a folder, with seed 0, on the CPU."""
    command = [sys.executable, "evolve.py", "--device", "cpu", "--seed", "0", "--out", str(out)]
    command += options
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(command)} in {folder}: {done.stderr.strip()[-500:]}")


def scores(out):
    """{(method, task, length): (score, logprob, cache)} of a run, methods by their newest names."""
    found = {}
    for row in json.loads((out / "results.json").read_text("utf-8"))["report"]:
        method = row["method"]
        for old, new in OLDER.items():
            method = method.replace(old, new)
        found[method, row["task"], row["length"]] = row["score"], row["logprob"], row["cache"]
    return found


def differences(one, other):
    """What differs between two dicts, [text], and how many names they share."""
    shared, found = [name for name in one if name in other], []
    for name in shared:
        a, b = one[name], other[name]
        if torch.is_tensor(a):
            if a.shape != b.shape:
                found.append(f"{name}: {tuple(a.shape)}, {tuple(b.shape)}")
            elif not torch.equal(a, b):
                found.append(f"{name}: by {(a - b).abs().max().item():.2g} at most")
        elif a != b:
            found.append(f"{name}: {a}, {b}")
    return found, len(shared)


def compare(one, other):
    """{what: ([text: what differs], how many parts both have)} of two finished runs in folders."""
    states = []
    for out in (one, other):
        gpt = torch.load(out / "gpt.pt", weights_only=True)["model"]
        vector = torch.load(out / "namm.pt", weights_only=True)
        del vector["cost"]  # seconds
        states.append({"gpt.pt": gpt, "namm.pt": vector, "scores": scores(out)})
    return {what: differences(states[0][what], states[1][what]) for what in states[0]}


def main(line):
    """Compare two revisions, print a line for each thing, exit with 1 if one differs."""
    if len(line) not in (1, 2):
        raise ValueError("usage: python -m extras.same REVISION [OTHER]")
    revisions, differs = [line[0], (line + ["HEAD"])[1]], False
    with tempfile.TemporaryDirectory() as temporary:
        places = [pathlib.Path(temporary, "one"), pathlib.Path(temporary, "other")]
        for revision, place in zip(revisions, places):
            take_out(revision, place)
        for name, options in RUNS.items():
            outs = [place / "runs" / name for place in places]
            for place, out in zip(places, outs):
                run(place, out, options)
            for what, (found, count) in compare(*outs).items():
                differs = differs or bool(found) or not count
                said = f"{len(found)} of {count} differ, first {found[0]}" if found else "the same"
                print(f"{name:8s}{what:9s}{count:4d} compared: {said}", flush=True)
    sys.exit(1 if differs else 0)


if __name__ == "__main__":
    runs.command("extras.same", main)
