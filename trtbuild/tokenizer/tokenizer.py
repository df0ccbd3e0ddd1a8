"""Text to token ids and back, with the tokenizer of the canonical checkpoint."""

import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trtbuild.errors import UserError
from trtbuild.files import read_json, read_text
from trtbuild.limits import TOKEN_CHARACTERS, TOKENIZER_GROWTH
from trtbuild.tokenizer.damage import refusing
from trtbuild.tokenizer.template_worker import TemplateWorker


def published_tokenizer(folder: Path) -> Any:
    """The `PreTrainedTokenizerFast` of a folder, to which the names of special tokens in a text are these tokens.

    Raises `UserError` if the folder has none, or a damaged one.
    """
    if not (folder / "tokenizer.json").exists():
        raise UserError(f"{folder} has no tokenizer.json; give the checkpoint's folder, or convert it again")
    _check_files(folder)
    with refusing(f"the tokenizer in {folder} cannot be opened"):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


class Tokenizer:
    """`transformers`' fast tokenizer of a folder; no code from the folder is run.

    A special token is what a chat template writes, or what is put around every text; in the text that a user or an
    article brings its name is text like any other, and cannot end a turn. `chat_template` is the text of a Jinja
    template, in place of the folder's own. Raises `UserError` if the folder has no tokenizer.
    """

    def __init__(self, folder: Path | str, chat_template: str | None = None) -> None:
        self.folder, self._chat_template, self._worker = Path(folder), chat_template, TemplateWorker()
        self._tokenizer = published_tokenizer(self.folder)
        self.eos_token_ids, self._vocab_size = self._read_configs(self._tokenizer.eos_token_id)
        with refusing(f"the tokenizer in {self.folder} cannot be opened"):
            self._add_aliases()

    def _read_configs(self, eos_token_id: int | None) -> tuple[tuple[int, ...], int | None]:
        """All ends of a text, beginning with the tokenizer's own, and the model's vocabulary, as far as it is known."""
        ids, vocab_size = [eos_token_id], None
        for name in ("config.json", "generation_config.json"):
            if (self.folder / name).exists():
                config = read_json(self.folder / name)
                if type(config.get("vocab_size")) is int:
                    vocab_size = config["vocab_size"]
                eos = config.get("eos_token_id")
                ids += eos if isinstance(eos, list) else [eos]
                if not all(i is None or (type(i) is int and i >= 0) for i in ids):
                    raise UserError(f"{self.folder / name}: eos_token_id is {eos!r}; token ids are expected")
        return tuple(dict.fromkeys(i for i in ids if i is not None)), vocab_size

    @property
    def chat_template(self) -> str:
        """The text of the chat template. Raises `UserError` if there is none."""
        try:
            return self._chat_template or self._tokenizer.get_chat_template()
        except ValueError as error:
            raise UserError(
                f"the tokenizer in {self.folder} has no chat template; leave chat off, or name one: chat_template of "
                "the model in config/models.yaml, or --chat-template"
            ) from error

    def _add_aliases(self) -> None:
        """Gives each special token a second name, which no text can hold, so that its published one can be text.

        Special tokens and text are then encoded in one go, and a text is cut where the published tokenizer cuts it.
        """
        from tokenizers import AddedToken

        backend, secret = self._tokenizer.backend_tokenizer, secrets.token_hex(8)
        self._mark, self._cut = f"{secret}:text;", f"{secret}:cut;"
        added = backend.get_added_tokens_decoder().items()
        special = {i: token for i, token in added if token.special or i in self.eos_token_ids}
        if (longest := max((len(token.content) for token in special.values()), default=0)) > TOKEN_CHARACTERS:
            raise UserError(f"{self.folder}: a special token has {longest} characters; at most {TOKEN_CHARACTERS}")
        names = {i: f"{secret}:{i};" for i in special}
        # The published ones must be special for `split_special_tokens` to split them, the second ones must not.
        backend.add_special_tokens([AddedToken(t.content, special=True) for t in special.values() if not t.special])
        backend.add_tokens(
            [AddedToken(names[i], lstrip=t.lstrip, rstrip=t.rstrip, normalized=False) for i, t in special.items()]
            + [AddedToken(self._cut, normalized=False)]
        )
        self._alias = {token.content: names[i] for i, token in special.items()}
        self._ids = {backend.token_to_id(name): [i] for i, name in names.items()} | {backend.token_to_id(self._cut): []}
        longest_first = sorted(map(re.escape, self._alias), key=len, reverse=True)
        parts = {name[:end] for name in self._alias for end in range(1, len(name))}
        beginnings = (rf"{re.escape(part)}\Z" for part in sorted(parts, key=len, reverse=True))
        self._to_mark = re.compile("|".join([*longest_first, *beginnings]) or "(?!)")
        self._marked_or_special = re.compile("|".join([f"{self._mark}(?:{'|'.join(longest_first)})?", *longest_first]))

    def literal(self, text: str) -> str:
        """`text` with a mark before each special token's name, of which `encode(special_tokens=True)` makes text again.

        The beginning of a name at the end of the text is marked as well: the rest of it might follow.
        """
        return self._to_mark.sub(lambda name: self._mark + name[0], text)

    def encode(
        self, text: str, chat: bool = False, special_tokens: bool = False, system: str | None = None
    ) -> list[int]:
        """Token ids of a text; with `chat` of it as a user's message, after one of the system, ready for the answer.

        `special_tokens`: those that the text names are meant.
        """
        if not text:
            return []
        if chat:
            contents = {"system": system, "user": text} if system else {"user": text}
            messages = [{"role": role, "content": content} for role, content in contents.items()]
            return self.encode_chat(messages, special_tokens)
        return self._encode(text if special_tokens else self.literal(text), add_special_tokens=True)

    def encode_chat(self, messages: list[dict[str, str]], special_tokens: bool = False) -> list[int]:
        """Token ids of messages, each with `role` and `content`, and of what begins an answer.

        Where a template writes the variable `cut`, what is before and after is encoded apart. Raises `UserError` if
        there is no chat template, or if it fails.
        """
        if not special_tokens:
            messages = [message | {"content": self.literal(message["content"])} for message in messages]
        template = self.chat_template
        try:
            named = self._tokenizer.special_tokens_map
            text = self._worker.render(template, messages, **named, cut=self._cut)
        except UserError as error:
            raise UserError(f"the chat template fails: {error}") from error
        return self._encode(text, add_special_tokens=False)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text in which every special token is meant, but for the marked ones."""
        text = self._marked_or_special.sub(lambda it: self._alias.get(it[0], it[0].removeprefix(self._mark)), text)
        with refusing(f"the tokenizer in {self.folder} fails on {text[:40]!r}"):
            ids = self._tokenizer(text, add_special_tokens=add_special_tokens, split_special_tokens=True)["input_ids"]
        ids = [published for i in ids for published in self._ids.get(i, [i])]
        if ids and self._vocab_size and max(ids) >= self._vocab_size:
            raise UserError(
                f"the tokenizer in {self.folder} has the token {max(ids)}, the model's vocabulary {self._vocab_size}; "
                "they are not of one model"
            )
        return ids

    def special_token_ids(self, words: tuple[str, ...]) -> tuple[int, ...]:
        """Ids of those words that are special tokens, which `decode` leaves out."""
        special = {*self._tokenizer.all_special_tokens, *self._tokenizer.get_added_vocab()}
        return tuple(self._tokenizer.convert_tokens_to_ids(word) for word in words if word in special)

    def words_ids(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Token ids of texts as they may come: special tokens, or at the beginning, within a text, after a space."""
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            if special := self.special_token_ids((word,)):
                found[special] = None
                continue
            literal, before = self.literal(word), self._encode("\n", add_special_tokens=False)
            found[tuple(self._encode(literal, add_special_tokens=False))] = None
            for text in (literal, f" {literal}"):
                ids = self._encode(f"\n{text}", add_special_tokens=False)
                if ids[: len(before)] == before:  # a line's end is a token of its own, or the word is not to be told
                    found[tuple(ids[len(before) :])] = None
        return tuple(found)

    def decode(self, ids: list[int]) -> str:
        """Text of token ids without special tokens."""
        with refusing(f"the tokenizer in {self.folder} cannot decode {ids[:8]}"):
            published = [i for i in ids if i not in self._ids]  # a model may have more than the tokenizer
            return self._tokenizer.decode(published, skip_special_tokens=True)

    def text(self, ids: list[int], stop_words: tuple[str, ...] = ()) -> str:
        """`decode`, cut before the first stop word."""
        text = self.decode(ids)
        ends = [text.index(word) for word in stop_words if word in text]
        return text[: min(ends)] if ends else text


def _check_files(folder: Path) -> None:
    """Raises `UserError` for files that the libraries would open by themselves, and would not come back from.

    Replacements in `tokenizer.json` that follow each other multiply: a small file could fill the memory with a word.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json"):
        if os.path.lexists(folder / name):
            read_json(folder / name)
    if os.path.lexists(folder / "chat_template.jinja"):
        read_text(folder / "chat_template.jinja")
    growth, where = 1, folder / "tokenizer.json"
    parts = [part for key, part in read_json(where).items() if key in ("normalizer", "pre_tokenizer", "decoder")]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            if part.get("type") in ("Replace", "Prepend"):
                content = part.get("content", part.get("prepend"))
                growth *= max(1, len(content)) if isinstance(content, str) else 1
            parts += part.values()
        elif isinstance(part, list):
            parts += part
    if growth > TOKENIZER_GROWTH:
        raise UserError(f"{where} may make a text {growth} times as long; at most {TOKENIZER_GROWTH} is expected")
