"""What the pages of docs/ show is what happens: Python with ``>>>``, and commands after ``$`` in console blocks."""

import doctest
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import dask
import pytest

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {str(page.relative_to(DOCS)): page.read_text() for page in sorted(DOCS.rglob("*.md"))}
SHOWN = re.compile(r"(?ms)^```(python|console)\n(.*?)^```$")
COMMAND = re.compile(r"(?m)^\$ ((?:.*\\\n)*.*)\n((?:(?!\$ ).*\n)*)")
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def run_page(text, name):
    """Run the blocks of a page in their order, in the current folder; return how many examples there were."""
    count, names = 0, {"__name__": "__main__"}
    for block in SHOWN.finditer(text):
        line = text.count("\n", 0, block.start(2))
        if block[1] == "console":
            count += run_console(block[2], name, line)
        else:
            count += run_python(block[2], names, name, line)
    return count


def run_python(block, names, name, line):
    # Each block has a name of its own, by which doctest finds the lines of a function of an earlier one in a traceback.
    page = doctest.DocTestParser().get_doctest(block, {}, f"{name}:{line}", name, line)
    page.globs = names
    told = []
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    runner.run(page, out=told.append, clear_globs=False)
    assert not runner.failures, "".join(told)
    return runner.tries


def run_console(block, name, line):
    commands = COMMAND.findall(block)
    assert commands, f"{name}, block of line {line}: no line begins with $"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for command, wanted in commands:
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, timeout=120, env=os.environ | {"PATH": path}
        )
        where = f"{name}, block of line {line}: $ {command}\n"
        assert done.returncode == 0, f"{where}exit code {done.returncode}\n{done.stderr}"
        right = doctest.OutputChecker().check_output(wanted, done.stdout, FLAGS)
        assert right, f"{where}{done.stdout}\nand not\n{wanted}\nstandard error:\n{done.stderr}"
    return len(commands)


@pytest.mark.parametrize(
    "name", [name for name in PAGES if name != "containers.md" and re.search("(?m)^(>>>|```console)", PAGES[name])]
)
def test_page(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for package in re.findall(r"(?m)^>>> (?:import|from) (\w+)", PAGES[name]):
        pytest.importorskip(package, reason=f"{package} is not installed")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata")  # which Xarray writes all the same
        assert run_page(PAGES[name], name) > 0


@pytest.mark.parametrize(
    "page",
    ["```python\n>>> 1 + 1\n3\n\n```\n", "```console\n$ echo 1\n2\n```\n", "```console\n$ echo 1; false\n1\n```\n"],
)
def test_pages_can_fail(page):
    with pytest.raises(AssertionError, match=r"page\.md"):
        run_page(page, "page.md")


FIRST, *SECTIONS = re.split(r"(?m)^## ", PAGES.get("containers.md", ""))


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.partition("\n")[0])
def test_the_page_on_containers(section):
    for package in re.findall(r"(?m)^>>> (?:import|from) (\w+)", section):
        pytest.importorskip(package, reason=f"{package} is not installed")
    with dask.config.set(scheduler="sync"), warnings.catch_warnings():
        warnings.simplefilter("default")
        assert run_page(FIRST + section, "containers.md") > 5 or "```" not in section
