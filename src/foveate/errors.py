"""What Foveate raises: one clear sentence, before anything is computed."""

import difflib
from collections.abc import Iterable, Mapping


class FoveateError(Exception):
    """The root of every error that Foveate raises on purpose."""


class InvalidInput(FoveateError, ValueError):
    """The call itself is wrong: the message says what was given, what was wanted and what to do."""


class Unsupported(FoveateError, NotImplementedError):
    """The call is right, but what was asked to compute it cannot; made by `unsupported`."""

    @property
    def reasons(self) -> dict[str, list[str]]:
        """All reasons of each implementation that was asked."""
        return dict(self.args[1])

    def __str__(self) -> str:
        return str(self.args[0])


def unsupported(reasons: Mapping[str, list[str]]) -> Unsupported:
    """An `Unsupported` that lists every reason: ``sdpa: draws its dropout …, takes no softcap``."""
    text = "; ".join([f"{name}: " + ", ".join(why) for name, why in reasons.items()])
    return Unsupported(text, reasons)


def unknown_name(what: str, given: object, known: Iterable[str]) -> InvalidInput:
    """An `InvalidInput` for a name that does not exist, with the nearest one that does."""
    names = list(known)
    near = difflib.get_close_matches(str(given), names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return InvalidInput(f"unknown {what} {given!r}: {hint}the known ones are {', '.join(names)}")
