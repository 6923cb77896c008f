"""What a valid stack is: its shape, its dtype, its chunks."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

AssumeA = Literal[
    "general", "symmetric", "hermitian", "positive definite", "upper triangular", "lower triangular", "diagonal"
]
#: What users may write: also SciPy's short words.
AssumeAWord = AssumeA | Literal["gen", "sym", "her", "pos"]
Device = Literal["auto", "cpu", "gpu"]
OnError = Literal["raise", "skipna", "nan"]
#: In what is computed: as it is stored, or in float64 and complex128 always.
Precision = Literal["same", "double"]

#: What the short ones stand for.
SHORT_WORDS: dict[str, AssumeA] = {
    "gen": "general", "sym": "symmetric", "her": "hermitian", "pos": "positive definite"
}  # fmt: skip

#: The dtypes that kernels compute in, and what every other numeric kind becomes.
KEPT = ("float32", "float64", "complex64", "complex128")

#: So much of a wrong value is shown.
_LONGEST = 100


def shown(value: Any) -> str:
    """Return a value that is not what was expected, for an error: as it is written, or what it is if that is long.

    Examples
    --------
    >>> shown((2, 3)), shown(np.eye(3))
    ('(2, 3)', 'a numpy.ndarray')
    """
    kind, is_plain = type(value), isinstance(value, (str, int, float, complex, tuple, list, dict, type(None)))
    if is_plain and len(repr(value)) <= _LONGEST:
        return repr(value)
    return f"a {kind.__qualname__}" if kind.__module__ == "builtins" else f"a {kind.__module__}.{kind.__qualname__}"


def parse_choice(name: str, value: Any, choices: Any) -> Any:
    """Return `value` if it is one of the words of a list or of the Literal type `choices`, else raise ValueError."""
    words = get_args(choices) or choices
    if value not in words:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, words))}; got {value!r}")
    return value


def parse_assume_a(word: AssumeAWord) -> AssumeA:
    """Return what `word` says of the structure of matrices, in its long form, or raise ValueError.

    Examples
    --------
    >>> parse_assume_a("pos")
    'positive definite'
    """
    known = parse_choice("assume_a", word, [*get_args(AssumeA), *SHORT_WORDS])
    found: AssumeA = SHORT_WORDS.get(known, known)
    return found


def parse_flag(name: str, value: Any) -> bool:
    """Return whether something holds, or raise ValueError for a text: "no" would count as true."""
    if isinstance(value, str):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def parse_min_rcond(min_rcond: float) -> float:
    """Return `min_rcond` if it is a number from 0 to 1, else raise ValueError."""
    if not is_share(min_rcond):
        raise ValueError(f"`min_rcond=` must be between 0 and 1, got {min_rcond!r}")
    return float(min_rcond)


def is_share(value: Any) -> bool:
    """Tell whether something is a number from 0 to 1."""
    try:
        return bool(0 <= value <= 1)
    except (TypeError, ValueError):  # of no number, or of an array
        return False


def result_dtype(dtype: npt.DTypeLike) -> np.dtype[Any]:
    """Return the dtype of the inverse of a stack of `dtype`, in native byte order.

    Raises
    ------
    TypeError
        If `dtype` is not a bool, an integer, or a floating or complex number of at most 64 bits a part.

    Examples
    --------
    >>> result_dtype(">f4"), result_dtype("int8"), result_dtype("float16")
    (dtype('float32'), dtype('float64'), dtype('float32'))
    """
    dtype = np.dtype(dtype)
    if dtype.name in KEPT:
        return dtype.newbyteorder("=")
    if dtype.kind in "biu":
        return np.dtype("float64")
    if dtype.name in ("float16", "bfloat16"):
        return np.dtype("float32")
    raise TypeError(
        f"dtype {dtype.name} has no inverse here: expected float32, float64, complex64 or complex128, "
        "or bool, an integer or float16, which are converted"
    )


def real_dtype(dtype: npt.DTypeLike) -> np.dtype[Any]:
    """Return the dtype of norms and ``rcond`` for a stack of (result) `dtype`."""
    return np.finfo(np.dtype(dtype)).dtype


def computed_dtype(dtype: npt.DTypeLike, stored: npt.DTypeLike, precision: Precision = "same") -> np.dtype[Any]:
    """Return in what matrices of `dtype` are inverted whose inverses are to be stored as another one.

    Examples
    --------
    >>> computed_dtype("float64", "float32"), computed_dtype("complex64", "complex64", "double")
    (dtype('float64'), dtype('complex128'))
    """
    found: np.dtype[Any] = np.result_type(result_dtype(dtype), np.dtype(stored))
    return np.result_type(found, np.float64) if precision == "double" else found


def check_shape(shape: tuple[float, ...]) -> int:
    """Return n for a shape ``(*, n, n)``, else raise LinAlgError with the shape in the message."""
    if len(shape) < 2:
        raise np.linalg.LinAlgError(
            f"expected a stack of matrices (*, n, n) with at least two dimensions, got shape {shape}"
        )
    # A size that Dask does not know (nan) is equal to nothing, not even itself.
    if shape[-1] != shape[-2]:
        raise np.linalg.LinAlgError(
            f"expected a stack of square matrices (*, n, n), got shape {shape}: "
            "the last two dimensions must be known and equally long"
        )
    return int(shape[-1])


def whole_matrices(chunks: tuple[tuple[float, ...], ...], itemsize: int) -> tuple[dict[int, Any], int] | None:
    """Return how to rechunk a stack so that no matrix is split, or None if none is.

    Parameters
    ----------
    chunks : tuple of tuple
        Dask chunks of the stack.
    itemsize : int
        Bytes of one element.

    Returns
    -------
    dict and int
        Arguments `chunks` and `block_size_limit` of `dask.array.rechunk`: the core dimensions become one
        chunk, and the batch chunks shrink so that a block keeps about its number of bytes.
    """
    if len(chunks[-1]) == 1 and len(chunks[-2]) == 1:
        return None
    batch = chunks[:-2]
    if any(math.isnan(size) for sizes in batch for size in sizes):
        # Dask cannot cut a dimension whose sizes it does not know: merge alone.
        return {len(batch): -1, len(batch) + 1: -1}, 0
    limit = itemsize * math.prod(int(max(sizes, default=0)) for sizes in chunks)
    wanted: dict[int, Any] = dict.fromkeys(range(len(batch)), "auto")
    wanted.update({len(batch): -1, len(batch) + 1: -1})
    return wanted, limit
