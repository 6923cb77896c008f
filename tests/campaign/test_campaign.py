"""The fault campaign in its short form: a few runs of each part, against real processes."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
#: What the short form has; the others need root, a server, or many minutes.
SHORT = ["workers", "stores", "updates"]


@pytest.mark.parametrize("part", SHORT)
def test_nothing_is_lost(tmp_path, part):
    ended = subprocess.run(
        [sys.executable, "-m", "tests.campaign", "--share", "0.01", "--only", part, "--folder", tmp_path,
         "--seed", str(random.Random(part).randrange(1000))],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]
    assert ended.stdout.count(" of ") >= 1


@pytest.mark.slow
@pytest.mark.parametrize("part", ["clients", "schedulers", "bits", "stops", "groups", "poison"])
def test_nothing_is_lost_in_minutes(tmp_path, part):
    test_nothing_is_lost(tmp_path, part)
