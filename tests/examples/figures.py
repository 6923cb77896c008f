"""The figures that the page of an example shows are those that its script prints."""

import re
from pathlib import Path

import numpy as np
import pytest

PAGES = Path(__file__).parents[2] / "docs" / "examples"
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")


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
