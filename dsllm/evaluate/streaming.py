"""Turns generated tokens into text as they come: what each adds to the text before it, in whole characters."""

from collections.abc import Sequence

from dsllm.data.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
"""Stands for bytes that are not a whole character yet."""


MOST_WAITING = 16
"""Tokens; a character is made of 4 at most, so more of them are not the beginning of one."""


class TextStream:
    """The text that tokens add to a prompt.

    Tokens are decoded together with those before them, because a tokenizer may decode the first token of a text in another
    way than a later one: Llama-2's leaves its space out. Only the last few are decoded again, so the time per token does not
    grow with the text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]):
        """Begin after the prompt's ids."""
        self._tokenizer = tokenizer
        self._ids = list(prompt)  # the last ones that are shown, then those that are not
        self._num_shown = len(self._ids)
        self._shown = tokenizer.decode(self._ids)

    def add(self, token: int) -> str:
        """The text that one more token completes; empty while a character's bytes are not all there."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        waiting = len(self._ids) - self._num_shown
        if text == self._shown:  # a special token, or one that the model's vocabulary has and the tokenizer's has not
            if waiting > MOST_WAITING:
                del self._ids[self._num_shown]
            return ""
        return "" if text.endswith(REPLACEMENT) and waiting < MOST_WAITING else self._take(text)

    def end(self) -> str:
        """The rest, where the last token ends inside a character."""
        return self._take(self._tokenizer.decode(self._ids))

    def _take(self, text: str) -> str:
        new = text[len(self._shown) :]
        self._ids = self._ids[self._num_shown :]
        self._num_shown = len(self._ids)
        self._shown = self._tokenizer.decode(self._ids)
        return new
