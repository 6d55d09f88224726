"""What a run takes in hours and money, and whether that is weeks."""

from __future__ import annotations

from dataclasses import dataclass

_LONG = 7 * 24  # hours


@dataclass(frozen=True)
class Bill:
    """A whole run.

    Attributes:
        hours: of wall time, predicted. ranks: cards. price: of one card for an hour, in whatever money; None: not told.
    """

    hours: float
    ranks: int = 1
    price: float | None = None

    @property
    def money(self) -> float | None:
        return None if self.price is None else self.hours * self.ranks * self.price

    @property
    def takes_weeks(self) -> bool:
        return self.hours >= _LONG

    def in_words(self) -> str:
        """The time in the unit that fits: minutes, hours, days from two on, weeks from one on."""
        if self.takes_weeks:
            return f"{self.hours / _LONG:,.1f} weeks"
        if self.hours >= 48:
            return f"{self.hours / 24:,.1f} days"
        return f"{self.hours:,.1f} hours" if self.hours >= 1 else f"{self.hours * 60:,.1f} minutes"

    def money_in_words(self) -> str:
        if self.money is None:
            return ""
        return f"{self.money:,.0f}" if self.money >= 100 else f"{self.money:,.2f}"

    def warning(self) -> str:
        """A sentence where a run takes a week or more; else nothing."""
        if not self.takes_weeks:
            return ""
        return (
            f"This run takes {self.in_words()} on {self.ranks} such card{'s' if self.ranks > 1 else ''}: a smaller model, fewer `steps`, "
            "a smaller `global_batch`, smaller pictures (`model_options`) or more cards (`--ranks`) make it shorter."
        )
