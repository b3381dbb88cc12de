"""What the tests of the commands share."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Folder of a finished run, as small as can be, with two KV heads a layer."""
    corpus, out = tmp_path_factory.mktemp("corpus"), tmp_path_factory.mktemp("run") / "run"
    for name in ("namm.py", "model.py", "evolve.py", "data.py", "test_namm.py", "README.md"):
        shutil.copy(ROOT / name, corpus)
    options = ["--preset", "smoke", "--device", "cpu", "--corpus", corpus, "--out", out,
               "--steps", "5", "--generations", "1", "--report_at", "1,2", "--evolve_at", "1,2",
               "--n_kv_head", "2", "--methods", "namm,full", "--rows", "2"]
    done = subprocess.run([sys.executable, "evolve.py", *map(str, options)], cwd=ROOT, text=True,
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return out
