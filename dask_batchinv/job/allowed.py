"""How many matrices may fail: of all kinds, or of each, as a number or a share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dask_batchinv.outcome import FAILURE_KINDS, RefusedError
from dask_batchinv.shown import counted

#: What users may say: ``0``, ``None`` or ``"any"``, ``"0.1%"``, ``"not_finite=any,singular=0"``.
MaxFailed = int | str | None
_EXAMPLE = "a number, a share such as 0.1%, 'any', or some of these by kind: not_finite=any,singular=0"


@dataclass(frozen=True)
class _Limit:
    """A number, or a share of all matrices."""

    count: float
    is_share: bool = False

    @classmethod
    def parse(cls, text: str) -> _Limit:
        if text == "any":
            return cls(float("inf"))
        is_share = text.endswith("%")
        count = float(text[:-1]) / 100 if is_share else int(text)
        if not 0 <= count <= (1 if is_share else float("inf")):
            raise ValueError
        return cls(count, is_share)

    def of(self, matrices: int) -> float:
        return self.count * matrices if self.is_share else self.count


@dataclass(frozen=True)
class Allowed:
    """How many matrices may fail.

    Kinds that have no limit of their own count together against that of the others.
    """

    others: _Limit
    kinds: Mapping[str, _Limit]

    @classmethod
    def parse(cls, given: MaxFailed) -> Allowed:
        """Return what is meant by what users say.

        Raises
        ------
        RefusedError
            If it is nothing of that.

        Examples
        --------
        >>> Allowed.parse("1%,singular=0").exceeded({"singular": 0, "overflow": 3}, 300) is None
        True
        """
        limits: dict[str, _Limit] = {}
        try:
            for part in ("any" if given is None else str(given)).split(","):
                kind, mark, limit = part.strip().rpartition("=")
                kind = kind.strip().replace("-", "_")
                if kind in limits or (mark and kind not in FAILURE_KINDS):
                    raise ValueError
                limits[kind] = _Limit.parse(limit.strip())
        except ValueError:
            raise RefusedError(
                f"`max_failed=` takes {_EXAMPLE} (of {', '.join(FAILURE_KINDS)}), got {given!r}"
            ) from None
        return cls(limits.pop("", _Limit(0)), limits)

    def exceeded(self, failed: Mapping[str, int], matrices: int) -> str | None:
        """Return what is more than allowed, in words; None if nothing is."""
        left = {kind: count for kind, count in failed.items() if kind not in self.kinds}
        counts = [([kind], failed.get(kind, 0), limit) for kind, limit in self.kinds.items()]
        counts.append(([*left] if self.kinds else [], sum(left.values()), self.others))
        found = [
            f"{counted(count, 'matrix')} {_words(kinds, count)}, {limit.of(matrices):,.0f} allowed"
            for kinds, count, limit in counts
            if count > limit.of(matrices)
        ]  # fmt: skip
        return "; ".join(found) or None


def _words(kinds: list[str], count: int) -> str:
    if not kinds:
        return "has no inverse" if count == 1 else "have no inverse"
    return "failed as " + " or ".join(kind.replace("_", " ") for kind in kinds)
