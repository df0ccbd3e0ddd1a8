"""Text from an engine."""

import json
from pathlib import Path
from typing import Annotated

import typer

from trtbuild.cli.options import (
    ChatTemplate,
    Check,
    Device,
    DeviceOption,
    EngineDir,
    Runtime,
    RuntimeOption,
    TokenizerDir,
)
from trtbuild.errors import UserError
from trtbuild.files import read_text


def run(
    engine_dir: EngineDir,
    tokenizer_dir: TokenizerDir,
    input_text: Annotated[list[str] | None, typer.Option(help="A prompt; repeatable.")] = None,
    input_file: Annotated[Path | None, typer.Option(help="A text file, a prompt a line; blank lines are none.")] = None,
    max_output_len: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 50,
    chat: Annotated[bool, typer.Option("--chat", help="Apply a chat template to every prompt.")] = False,
    chat_template: ChatTemplate = None,
    system: Annotated[
        str | None, typer.Option(help="With --chat: what the system message before a prompt says.")
    ] = None,
    special_tokens: Annotated[
        bool, typer.Option("--special-tokens", help="Special tokens that a prompt names are meant, not text.")
    ] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it comes; one prompt only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a prompt.")] = False,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample from the k most likely tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the most likely tokens of this mass; 1: all.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: repeat less.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling; prompt i uses seed + i, in any batch.")] = 0,
    stop_word: Annotated[list[str] | None, typer.Option(help="Stop where this text appears; repeatable.")] = None,
    runtime: RuntimeOption = Runtime.auto,
    device: DeviceOption = Device.auto,
    check: Check = False,
) -> None:
    """Continue prompts.

    Example: trtbuild run --engine-dir engine --tokenizer-dir checkpoint --chat --input-text "What is a star?"

    A chat model whose tokenizer has no template: trtbuild run --engine-dir engine --tokenizer-dir checkpoint --chat
    --chat-template qwen --input-text "What is a star?"
    """
    from trtbuild.runtime.generation import generate
    from trtbuild.runtime.open import open_engine
    from trtbuild.runtime.sampling import SamplingParams
    from trtbuild.runtime.streaming import TextStream
    from trtbuild.tokenizer.chat_template import read as read_template
    from trtbuild.tokenizer.tokenizer import Tokenizer

    if (chat_template or system) and not chat:
        raise UserError("--chat-template and --system are for a chat; add --chat, or leave them out")
    texts = list(input_text or [])
    if input_file:
        texts += _read_prompts(input_file)
    if not texts:
        empty = f"{input_file} holds no prompt" if input_file else "there is no prompt"
        raise UserError(f"{empty}; give --input-text or --input-file")
    if stream and (len(texts) > 1 or as_json):
        raise UserError("--stream prints one prompt as plain text; leave out --json and give one --input-text")
    tokenizer = Tokenizer(tokenizer_dir, read_template(chat_template) if chat_template else None)
    prompts = [tokenizer.encode(text, chat, special_tokens, system) for text in texts]
    session = open_engine(engine_dir, runtime, device, check).session
    stop_words = tuple(stop_word or ())
    ends = tokenizer.eos_token_ids + tokenizer.special_token_ids(stop_words)
    params = SamplingParams(max_output_len, temperature, top_k, top_p, repetition_penalty, seed, stop_words, ends)
    if stream:
        text_stream = TextStream(tokenizer, stop_words, lambda text: print(text, end="", flush=True))
        generate(session, prompts, params, tokenizer.decode, lambda _, token: text_stream.put(token))
        text_stream.end()
        print()
        return
    outputs = generate(session, prompts, params, tokenizer.decode)
    for text, prompt, output in zip(texts, prompts, outputs, strict=True):
        answer = tokenizer.text(output.output_ids, stop_words)
        if as_json:
            fields = {"input_ids": prompt, "output_ids": output.output_ids, "text": answer}
            print(json.dumps(fields | {"finish_reason": output.finish_reason}, ensure_ascii=False))
        else:
            print(f"> {text}\n{answer}\n")


def _read_prompts(path: Path) -> list[str]:
    return [line for line in read_text(path).split("\n") if line.strip()]
