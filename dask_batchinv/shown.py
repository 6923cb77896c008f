"""What is shown as a heading and rows of a label and a value: on terminals and in notebooks."""

from __future__ import annotations

from html import escape

from dask_batchinv.text import clean

#: A label and what it is of; one without a label belongs to the row before.
Row = tuple[str, str]
#: The width of labels, with the space behind them, where none is longer.
_WIDTH = 17


def counted(count: int, noun: str) -> str:
    """Return how many of something there are.

    Examples
    --------
    >>> counted(1, "matrix"), counted(2000, "matrix"), counted(0, "tile")
    ('1 matrix', '2,000 matrices', '0 tiles')
    """
    several = "matrices" if noun == "matrix" else f"{noun}s"
    return f"{count:,} {noun if count == 1 else several}"


class Shown:
    """What shows itself."""

    def heading(self) -> str:
        """Return the first line; empty if there is none."""
        return ""

    def rows(self) -> list[Row]:
        """Return the others."""
        raise NotImplementedError

    def __str__(self) -> str:
        return as_text(self.heading(), self.rows())

    def _repr_html_(self) -> str:
        return as_html(self.heading(), self.rows())


def as_text(heading: str, rows: list[Row]) -> str:
    """Return rows for a terminal.

    Examples
    --------
    >>> print(as_text("done", [("matrices", "3"), ("", "1 singular")]))
    done
    matrices         3
      1 singular
    """
    width = max([_WIDTH, *(len(label) + 2 for label, _ in rows)])
    lines = [heading] if heading else []
    lines += [f"{label:{width}}{value}" if label else f"  {value}" for label, value in rows]
    return "\n".join(map(clean, lines))


def as_html(heading: str, rows: list[Row]) -> str:
    """Return rows for a notebook.

    Examples
    --------
    >>> as_html("a < b", [("matrices", "3")])  # doctest: +ELLIPSIS
    '<div><strong>a &lt; b</strong><table>...matrices</th>...3</td></tr></table></div>'
    """
    left = 'style="text-align: left"'
    body = "".join(
        f"<tr><th {left}>{escape(clean(label))}</th><td {left}>{escape(clean(value))}</td></tr>"
        for label, value in rows
    )
    return f"<div><strong>{escape(clean(heading))}</strong><table>{body}</table></div>"
