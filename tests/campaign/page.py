"""The table of the campaign, in docs/reliability.md: made from the rows in docs/reliability.json."""

from __future__ import annotations

import fcntl
import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import distributed
import zarr

from tests.campaign.work import Row

_BEGIN, _END = "<!-- the table: made by ci/campaign -->", "<!-- end of the table -->"
_HEAD = """\
| fault | faults | runs | all held | done twice | slowest run |
|---|---:|---:|---:|---:|---:|
"""


def line(row: Row) -> str:
    """Return a row for people who watch."""
    return f"{row.fault}: {row.passes} of {row.runs} ({row.faults} faults, {row.seconds:.0f} s) {row.remarks or ''}"


def record(docs: Path, part: str, row: Row, seed: int) -> None:
    """Put a row into the JSON file, in place of an older one of the same fault, and write the page anew."""
    path = docs / "reliability.json"
    with (docs / "reliability.json.lock").open("w") as lock:  # several parts may run at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        known: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
        versions = {
            "python": platform.python_version(), "distributed": distributed.__version__, "zarr": zarr.__version__,
        }  # fmt: skip
        entry = {"part": part, "seed": seed, "versions": versions} | asdict(row)
        known = [old for old in known if old["fault"] != row.fault] + [entry]
        order = {name: i for i, name in enumerate(dict.fromkeys(old["part"] for old in known))}
        known.sort(key=lambda old: order[old["part"]])
        path.write_text(json.dumps(known, indent=1) + "\n")
        write(docs)
    (docs / "reliability.json.lock").unlink(missing_ok=True)


def write(docs: Path) -> None:
    """Write the table into the page, from the JSON file alone."""
    page = docs / "reliability.md"
    rows = json.loads((docs / "reliability.json").read_text())
    text = page.read_text()
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    page.write_text(f"{before}{_BEGIN}\n\n{table(rows)}\n{_END}{after}")


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table and its notes as Markdown."""
    lines = [
        f"| {row['fault']} | {row['faults']:,} | {row['runs']:,} | {row['passes']:,} | {row['redone']} "
        f"| {row['slowest']:.0f} s |\n"
        for row in rows
    ]
    total = {name: sum(row[name] for row in rows) for name in ("faults", "runs", "passes")}
    lines.append(f"| **all** | **{total['faults']:,}** | **{total['runs']:,}** | **{total['passes']:,}** | | |\n")
    notes = [f"- {row['fault']}: {_words(row['remarks'])}\n" for row in rows if row["remarks"]]
    failures = [f"- {row['fault']}: {failure}\n" for row in rows for failure in row["failures"]]
    seeds = sorted({row["seed"] for row in rows})
    versions = sorted({", ".join(f"{name} {number}" for name, number in row["versions"].items()) for row in rows})
    made = f"Made with {'; '.join(versions)}; seed {', '.join(map(str, seeds))}.\n"
    parts = ["".join([_HEAD, *lines]), made]
    if notes:
        parts.append("Measured beside:\n\n" + "".join(notes))
    if failures:
        parts.append("Runs in which something did not hold:\n\n" + "".join(failures))
    return "\n".join(parts)


def _words(remarks: dict[str, Any]) -> str:
    return "; ".join(f"{name} {value:,}" if isinstance(value, (int, float)) else f"{name}: {value}"
                     for name, value in remarks.items())  # fmt: skip
