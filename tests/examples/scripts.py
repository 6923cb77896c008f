"""Examples run as users run them, and the figures of their pages, which are those that they print."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "examples"
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")


def script(name: str) -> Path:
    """Return where the script of an example is."""
    return ROOT / "examples" / f"{name}.py"


def run_example(name: str, folder: Path, *arguments: str, pictures: tuple[str, ...] = ()) -> str:
    """Run an example, for which a warning is an error; return what it prints. It has drawn its pictures."""
    pytest.importorskip("matplotlib", reason="the example draws: pip install .[examples]")
    command = [sys.executable, "-W", "error", script(name), folder, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    for picture in pictures or (name,):
        assert (folder / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    return done.stdout


def assert_printed(name: str, stdout: str) -> None:
    """Assert that each line of the page's ``text`` blocks was printed: word by word, numbers to the last digit or two.

    The bits of a sine are not the same on all machines, and a sample at the edge of a pixel may fall into the next.
    """
    if not PAGES.exists():
        pytest.skip("source distributions have no pages")
    blocks = re.findall(r"(?ms)^```text\n(.*?)^```", (PAGES / f"{name}.md").read_text())
    shown = [line for line in "".join(blocks).splitlines() if line]
    assert shown
    printed = iter(stdout.splitlines())
    for line in shown:
        same = next((other for other in printed if NUMBER.sub("#", other) == NUMBER.sub("#", line)), None)
        assert same is not None, f"not printed, or not in this order: {line}"
        expected, found = ([float(x.replace(",", "")) for x in NUMBER.findall(text)] for text in (line, same))
        np.testing.assert_allclose(found, expected, rtol=0.03, err_msg=line)
