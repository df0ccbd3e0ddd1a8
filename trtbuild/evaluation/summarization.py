"""Summaries of articles, one JSON object a line."""

import json
import re
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path

from trtbuild.datasets import Article
from trtbuild.errors import UserError
from trtbuild.evaluation.partial import partial_outputs
from trtbuild.files import atomic, parse_json, read_json, read_text, write_json
from trtbuild.runtime.generation import OnOutput, Output
from trtbuild.tokenizer.tokenizer import Tokenizer

PLACEHOLDER = "{article}"
CJK = "\u2e80-\U0010ffff"
LETTER = rf"[^\s{CJK}]"
LAST_WORD = re.compile(rf"(?<=\S)(?:\s+|(?<=[{CJK}])){LETTER}{{,40}}\Z")


def summarization_prompts(
    articles: list[Article], tokenizer: Tokenizer, template: str, chat: bool, max_input_len: int
) -> list[list[int]]:
    """Token ids of `template` with each article in the place of `{article}`.

    Special tokens that the template names are meant, those that an article names are text. An article too long for
    `max_input_len` keeps as much of its beginning as lets the whole prompt fit.
    """
    if PLACEHOLDER not in template:
        raise UserError(f"the summarization prompt {template!r} does not contain {PLACEHOLDER}")

    def encode(text: str) -> list[int]:
        return tokenizer.encode(template.replace(PLACEHOLDER, tokenizer.literal(text)), chat, special_tokens=True)

    prompts = []
    for article in articles:
        ids = encode(article.article)
        if len(ids) > max_input_len:
            text = article.article.strip()
            size = lambda length: len(encode(beginning(text, length)))  # noqa: B023
            fitting = bisect_right(range(len(text) + 1), max_input_len, key=size) - 1
            if fitting < 1:
                raise UserError(
                    f"the summarization prompt alone has {size(0)} tokens, so that none of article {article.id} fits "
                    f"into max_input_len {max_input_len}"
                )
            ids = encode(beginning(text, fitting))
        prompts.append(ids)
    return prompts


def beginning(text: str, length: int) -> str:
    """The first `length` characters, without a word that they cut in two.

    What has more than 40 characters, such as an address, is no word; Chinese and Japanese put no space between words.
    """
    in_word = re.match(LETTER, text[length : length + 1])
    return (LAST_WORD.sub("", text[:length]) if in_word else text[:length]).rstrip()


def write_summaries(
    path: Path,
    articles: list[Article],
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    generate: Callable[[list[list[int]], OnOutput], list[Output]],
    provenance: dict,
) -> None:
    """Generates and writes `path` (id, reference, summary, token ids), and `provenance` beside it as .meta.json.

    Those that an interrupted run of the same `provenance` and prompts left are not generated again.
    """
    with partial_outputs(path, [provenance, prompts], len(prompts)) as partial, atomic(path) as temporary:
        missing = [i for i in range(len(prompts)) if i not in partial.there]
        generate([prompts[i] for i in missing], lambda n, output: partial.add(missing[n], output))
        outputs = [partial.there[i] for i in range(len(prompts))]
        with open(temporary, "w", encoding="utf-8") as file:
            for article, prompt, output in zip(articles, prompts, outputs, strict=True):
                record = {
                    "id": article.id,
                    "summary": tokenizer.decode(output.output_ids).strip(),
                    "reference": article.highlights,
                    "input_tokens": len(prompt),
                    "output_ids": output.output_ids,
                    "finish_reason": output.finish_reason,
                }
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        write_json(meta_path(path), provenance)


def read_summaries(path: Path) -> tuple[list[dict], dict]:
    """The records of a summaries file, and the provenance beside it. Raises `UserError` for files that hold others."""
    lines = read_text(path).removesuffix("\n").split("\n")  # splitlines() would also split at U+2028 and its like
    records = [_record(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if lines != [""]]
    if not records:
        raise UserError(f"{path} holds no summaries; make it with 'trtbuild summarize'")
    origin = read_json(meta_path(path))
    if not all(isinstance(origin.get(key), str) for key in ("engine", "dtype", "model")):
        raise UserError(f"{meta_path(path)} does not say which engine wrote the summaries, of which model and dtype")
    return records, origin


def _record(line: str, where: str) -> dict:
    value = parse_json(line, where)
    if not isinstance(value, dict) or not all(isinstance(value.get(key), str) for key in ("summary", "reference")):
        raise UserError(f"{where}: an object with the texts summary and reference is expected")
    return value


def meta_path(path: Path) -> Path:
    """Where the provenance of a summaries file lies."""
    return path.with_suffix(".meta.json")
