"""Text to token ids and back, with the tokenizer of the canonical checkpoint."""

from pathlib import Path

from trtbuild.errors import UserError
from trtbuild.files import read_json


class Tokenizer:
    """`transformers`' fast tokenizer of a folder; no code from the folder is run.

    Raises `UserError` if the folder has none.
    """

    def __init__(self, folder: Path | str) -> None:
        from transformers import PreTrainedTokenizerFast

        self.folder = Path(folder)
        if not (self.folder / "tokenizer.json").exists():
            raise UserError(f"{self.folder} has no tokenizer.json; give the checkpoint's folder, or convert it again")
        read_json(self.folder / "tokenizer.json")
        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(self.folder, local_files_only=True)
        self.eos_token_ids = self._eos_token_ids()

    def _eos_token_ids(self) -> tuple[int, ...]:
        ids = [self._tokenizer.eos_token_id]
        for name in ("config.json", "generation_config.json"):
            if (self.folder / name).exists():
                eos = read_json(self.folder / name).get("eos_token_id")
                ids += eos if isinstance(eos, list) else [eos]
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    def encode(self, text: str, chat: bool = False) -> list[int]:
        """Token ids of a text; with `chat` of that text as a user's message, ready for the answer."""
        if not text:
            return []
        if not chat:
            return self._tokenizer(text)["input_ids"]
        if not self._tokenizer.chat_template:
            raise UserError(f"the tokenizer in {self.folder} has no chat template; leave chat off")
        messages = [{"role": "user", "content": text}]
        return self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )

    def special_token_ids(self, words: tuple[str, ...]) -> tuple[int, ...]:
        """Ids of those words that are special tokens, which `decode` leaves out."""
        special = {*self._tokenizer.all_special_tokens, *self._tokenizer.get_added_vocab()}
        return tuple(self._tokenizer.convert_tokens_to_ids(word) for word in words if word in special)

    def decode(self, ids: list[int]) -> str:
        """Text of token ids without special tokens."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def text(self, ids: list[int], stop_words: tuple[str, ...] = ()) -> str:
        """`decode`, cut before the first stop word."""
        text = self.decode(ids)
        ends = [text.index(word) for word in stop_words if word in text]
        return text[: min(ends)] if ends else text
