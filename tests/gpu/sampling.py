"""What a generated token costs by how it is chosen: kinds of sampling within a captured step, and beams.

    python tests/gpu/sampling.py --batch-sizes 4 16 --contexts 128 2048

LLaMA-7B's shapes with dummy weights (`run.py`). Beams are four to a prompt, so that a batch is as many sequences in all
rows.
"""

import argparse
import statistics

import torch
from run import MODELS, recipe_network, timed

from trtbuild.engine.config import BuildLimits
from trtbuild.engine.portable import PortableEngine
from trtbuild.models.families import config_from_hugging_face
from trtbuild.runtime.beams import beam_search
from trtbuild.runtime.generation import generate
from trtbuild.runtime.sampling import SamplingParams
from trtbuild.runtime.session import PortableSession

SHORT, LONG = 8, 72
BEAMS = 4
BAD = (*((i,) for i in range(3, 19)), (20, 21), (22, 23, 24))
KINDS = {
    "greedy": {},
    "drawn": {"temperature": 0.8},
    "top-k, top-p": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "repetition": {"repetition_penalty": 1.1},
    "presence, frequency": {"presence_penalty": 0.5, "frequency_penalty": 0.5},
    "bad words, least length": {"bad_words": BAD, "min_output_len": 8, "eos_token_ids": (2,)},
    "all of them": {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1, "presence_penalty": 0.5}
    | {"bad_words": BAD, "min_output_len": 8, "eos_token_ids": (2,)},
}


def per_token(call) -> float:
    """Milliseconds, of the median of five; the first call captures graphs."""
    times = {}
    for length in (SHORT, LONG):
        call(length)
        times[length] = statistics.median(timed(lambda: call(length))[0] for _ in range(5))  # noqa: B023
    return 1000 * (times[LONG] - times[SHORT]) / (LONG - SHORT)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="llama-7b")
    parser.add_argument("--recipe", default="fp16")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--kinds", nargs="+", default=[*KINDS], choices=KINDS)
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 2048])
    options = parser.parse_args()
    config = config_from_hugging_face(MODELS[options.model]["config"], options.model)
    limits = BuildLimits(max(options.batch_sizes), max(options.contexts), LONG)
    network = recipe_network(config, options.recipe, limits)
    session = PortableSession(PortableEngine(network, limits, torch.device("cuda")))
    print("| batch | context | how | ms a token |\n| --- | --- | --- | --- |")
    for batch in options.batch_sizes:
        for context in options.contexts:
            prompts = torch.randint(30, session.vocab_size, (batch, context)).tolist()
            for name in options.kinds:
                made = lambda length: generate(session, prompts, SamplingParams(length, **KINDS[name]))  # noqa: B023
                print(f"| {batch} | {context} | {name} | {per_token(made):.3f} |", flush=True)
            few = prompts[: batch // BEAMS]
            found = lambda length: beam_search(session, few, SamplingParams(length, num_beams=BEAMS))  # noqa: B023
            print(f"| {batch} | {context} | {BEAMS} beams | {per_token(found):.3f} |", flush=True)


if __name__ == "__main__":
    main()
