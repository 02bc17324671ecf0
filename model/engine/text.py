"""Tokens become text as they are made: characters never split, stop strings found across tokens."""

from model.chat import Tokenizer


class TextStream:
    """The text of one growing answer.

    What `push` and `finish` return, joined, is the answer up to the first stop string. Text that
    may still turn out to be the beginning of a stop string is held back until that is known.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> None:
        self._decoder = tokenizer.stream()
        self._stop = stop
        self._held = ""
        self.stopped = False
        self.released = 0  # characters

    @property
    def held(self) -> int:
        """Bytes at the end of what was pushed that are not released yet."""
        return len(self._held.encode()) + self._decoder.pending

    def push(self, token: int, looking: bool = True) -> str:
        """The text that became certain with this token. Sets `stopped` when a stop string ended
        it; unless `looking`, stop strings are text like any other.
        """
        text = self._decoder.push(token)
        return self._release(text) if looking else self._pass(text)

    def finish(self) -> str:
        """What is left when no more tokens come; an unfinished character becomes U+FFFD."""
        text = self._release(self._decoder.finish())
        if self.stopped:
            return text
        return text + self._pass("")

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        if not self._stop:
            return self._pass(text)
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return self._pass(text[: min(found)])
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = ""
        sure = self._pass(text[: len(text) - keep])
        self._held = text[len(text) - keep :]
        return sure

    def _pass(self, text: str) -> str:
        """Let go of what is held, and of `text`."""
        text, self._held = self._held + text, ""
        self.released += len(text)
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
