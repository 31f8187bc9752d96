"""Where text and ids meet: a continuation ends at a string, which may begin in one token and end in another."""

from collections.abc import Sequence


class StopStrings:
    """Text goes in piece by piece, and comes out as far as it is certain to stand before every stop string.

        stops ["\\n\\n"]     push "a\\n"  → "a"     push "b\\n"  → "\\nb"     push "\\nc"  → "", and `met` is "\\n\\n"

    What might be the beginning of a stop string is held back until the next piece tells; `flush` gives it up at the end.
    """

    def __init__(self, stops: Sequence[str]):
        if "" in stops:
            raise ValueError("a stop string must have at least one character")
        self.stops = tuple(stops)
        self.met: str | None = None  # the stop string at which the text ended
        self._held = ""

    def push(self, piece: str) -> str:
        """What may be shown now. After a stop string was met: nothing."""
        if self.met is not None:
            return ""
        text = self._held + piece
        places = [(text.find(stop), stop) for stop in self.stops if stop in text]
        if places:
            place, self.met = min(places, key=lambda found: found[0])
            self._held = ""
            return text[:place]
        most = min(len(text), max(map(len, self.stops), default=1) - 1)
        held = next((n for n in range(most, 0, -1) if any(stop.startswith(text[-n:]) for stop in self.stops)), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back."""
        held, self._held = self._held, ""
        return held


def before_stop(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """A whole text up to the first stop string in it, and that string; `None` where there is none."""
    filtered = StopStrings(stops)
    return filtered.push(text) + filtered.flush(), filtered.met
