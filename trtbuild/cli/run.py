"""Text from an engine."""

import json
from enum import StrEnum
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
    writable,
)
from trtbuild.errors import UserError


class EarlyStopping(StrEnum):
    false = "false"
    true = "true"
    never = "never"


def run(
    engine_dir: EngineDir,
    tokenizer_dir: TokenizerDir,
    input_text: Annotated[list[str] | None, typer.Option(help="A prompt; repeatable.")] = None,
    input_file: Annotated[
        Path | None,
        typer.Option(
            help="Prompts: text, one a line; .jsonl: objects with input_ids, prompt or text; .csv: rows of token ids; "
            ".npy: an array of token ids, padded with the end of sequence."
        ),
    ] = None,
    max_output_len: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 50,
    min_output_len: Annotated[int, typer.Option(help="No end of sequence before so many tokens.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Apply a chat template to every prompt.")] = False,
    chat_template: ChatTemplate = None,
    system: Annotated[
        str | None, typer.Option(help="With --chat: what the system message before a prompt says.")
    ] = None,
    special_tokens: Annotated[
        bool, typer.Option("--special-tokens", help="Special tokens that a prompt names are meant, not text.")
    ] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it comes; one prompt only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object an output.")] = False,
    output_csv: Annotated[
        Path | None,
        typer.Option(help="Rows of token ids, prompt and output, padded with the end of sequence.", callback=writable),
    ] = None,
    output_npy: Annotated[
        Path | None, typer.Option(help="The same as an int32 array [outputs, length].", callback=writable)
    ] = None,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample from the k most likely tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the most likely tokens of this mass; 1: all.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: repeat less.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Off the logits of tokens that the output has.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, for each time that it has them.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling; output i uses seed + i, in any batch.")] = 0,
    stop_word: Annotated[list[str] | None, typer.Option(help="Stop where this text appears; repeatable.")] = None,
    bad_word: Annotated[list[str] | None, typer.Option(help="Text whose tokens must not come; repeatable.")] = None,
    num_return_sequences: Annotated[
        int, typer.Option("--num-return-sequences", "--n-best", help="Outputs of a prompt, sampled or the best beams.")
    ] = 1,
    num_beams: Annotated[int, typer.Option(help="Above 1: beam search, with up to 8; portable runtime.")] = 1,
    length_penalty: Annotated[
        float, typer.Option(help="Of beams: above 0 long outputs are better, below worse.")
    ] = 1.0,
    early_stopping: Annotated[
        EarlyStopping, typer.Option(help="Of beams: whether to end as soon as enough have; never: look far ahead.")
    ] = EarlyStopping.false,
    runtime: RuntimeOption = Runtime.auto,
    device: DeviceOption = Device.auto,
    check: Check = False,
) -> None:
    """Continue prompts.

    Example: trtbuild run --engine-dir engine --tokenizer-dir checkpoint --chat --input-text "What is a star?"

    A chat model whose tokenizer has no template: trtbuild run --engine-dir engine --tokenizer-dir checkpoint --chat
    --chat-template qwen --input-text "What is a star?"

    The four best of beam search: trtbuild run --engine-dir engine --tokenizer-dir checkpoint --num-beams 4 --n-best 4
    --input-file prompts.txt --json
    """
    from trtbuild.progress import SHORT, OutputBar
    from trtbuild.runtime.generation import generate
    from trtbuild.runtime.open import open_engine
    from trtbuild.runtime.prompts import padded_rows, read_prompts, write_csv, write_npy
    from trtbuild.runtime.sampling import SamplingParams
    from trtbuild.runtime.streaming import TextStream
    from trtbuild.tokenizer.chat_template import read as read_template
    from trtbuild.tokenizer.tokenizer import Tokenizer

    if (chat_template or system) and not chat:
        raise UserError("--chat-template and --system are for a chat; add --chat, or leave them out")
    if temperature == 0 and (top_k > 1 or top_p < 1):
        raise UserError(
            "temperature 0 is greedy, where --top-k and --top-p have no effect; add --temperature 1, or leave them out"
        )
    if num_beams == 1 and (length_penalty != 1 or early_stopping != EarlyStopping.false):
        raise UserError("--length-penalty and --early-stopping are for beams; add --num-beams, or leave them out")
    tokenizer = Tokenizer(tokenizer_dir, read_template(chat_template) if chat_template else None)
    named: list[tuple[str, str | list[int]]] = [(f"prompt {i}", text) for i, text in enumerate(input_text or ())]
    if input_file:
        named += read_prompts(input_file, tokenizer.eos_token_ids)
    given = [one for _, one in named]
    if not given:
        empty = f"{input_file} holds no prompt" if input_file else "there is no prompt"
        raise UserError(f"{empty}; give --input-text or --input-file")
    if chat and not all(isinstance(one, str) for one in given):
        raise UserError(f"{input_file} holds token ids, which no chat template is applied to; leave out --chat")
    if stream and (len(given) > 1 or as_json or output_csv or output_npy or max(num_return_sequences, num_beams) > 1):
        raise UserError("--stream prints one output of one prompt as plain text; leave out what asks for others")
    if (output_csv or output_npy) and not tokenizer.eos_token_ids:
        raise UserError(f"{tokenizer_dir} knows no end of sequence to pad rows with; take --json")
    prompts = [tokenizer.encode(one, chat, special_tokens, system) if isinstance(one, str) else one for one in given]
    stop_words = tuple(stop_word or ())
    params = SamplingParams(
        max_output_len=max_output_len,
        min_output_len=min_output_len,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop_words=stop_words,
        eos_token_ids=tokenizer.eos_token_ids + tokenizer.special_token_ids(stop_words),
        bad_words=tokenizer.words_ids(bad_word or []),
        num_return_sequences=num_return_sequences,
        num_beams=num_beams,
        length_penalty=length_penalty,
        early_stopping="never" if early_stopping == EarlyStopping.never else early_stopping == EarlyStopping.true,
    )
    session = open_engine(engine_dir, runtime, device, check).session
    for (name, _), prompt in zip(named, prompts, strict=True):
        session.check_prompt(prompt, name)
    if stream:
        text_stream = TextStream(tokenizer, stop_words, lambda text: print(text, end="", flush=True))
        generate(session, prompts, params, tokenizer.decode, lambda _, token: text_stream.put(token))
        text_stream.end()
        print()
        return
    lengths = [len(prompt) for prompt in prompts for _ in range(num_return_sequences)]
    with OutputBar(lengths, max_output_len, "outputs", "output", SHORT) as bar:
        outputs = generate(
            session,
            prompts,
            params,
            tokenizer.decode,
            on_token=lambda index, token: bar.token(index),
            on_output=lambda index, output: bar.output(index),
            say=bar.say,
        )
    if output_csv or output_npy:
        sequences = [prompts[i // num_return_sequences] + output.output_ids for i, output in enumerate(outputs)]
        rows = padded_rows(sequences, max(map(len, prompts)) + max_output_len, tokenizer.eos_token_ids[0])
        if output_csv:
            write_csv(output_csv, rows)
        if output_npy:
            write_npy(output_npy, rows)
        if not as_json:
            return
    texts = [one if isinstance(one, str) else tokenizer.decode(one) for one in given]
    for number, output in enumerate(outputs):
        index = number // num_return_sequences
        answer = tokenizer.text(output.output_ids, stop_words)
        if as_json:
            fields = {"index": index, "prompt": texts[index], "input_ids": prompts[index]}
            fields |= {"output_ids": output.output_ids, "text": answer, "finish_reason": output.finish_reason}
            if output.score is not None:
                fields["score"] = output.score
            print(json.dumps(fields, ensure_ascii=False))
        else:
            score = "" if output.score is None else f"[{output.score:.4f}] "
            print(f"> {texts[index]}\n{score}{answer}\n")
