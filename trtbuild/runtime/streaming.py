"""Text as it comes, without half characters."""

from collections.abc import Callable

from trtbuild.tokenizer.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what a tokenizer shows for a character whose last bytes are still to come


class TextStream:
    """Turns tokens into pieces of text and hands each to `write`; text from a stop word on is held back."""

    def __init__(self, tokenizer: Tokenizer, stop_words: tuple[str, ...], write: Callable[[str], object]) -> None:
        self.tokenizer, self.stop_words, self.write = tokenizer, stop_words, write
        self.ids: list[int] = []
        self.printed = 0
        # A stop word may arrive in pieces: as many characters are kept back until they cannot be its beginning.
        self.hold = max((len(word) for word in stop_words), default=1) - 1

    def put(self, token: int) -> None:
        self.ids.append(token)
        text = self.tokenizer.text(self.ids, self.stop_words)
        if not text.endswith(REPLACEMENT):
            self._write_up_to(text[: max(0, len(text) - self.hold)])

    def end(self) -> None:
        """Writes what was kept back."""
        self._write_up_to(self.tokenizer.text(self.ids, self.stop_words))

    def _write_up_to(self, text: str) -> None:
        if len(text) > self.printed:
            self.write(text[self.printed :])
            self.printed = len(text)
