"""What `test_processes.py` starts on every rank: many models, each on all ranks and by rank 0 on one.

    mpiexec -n 4 python tests/runtime/all_ranks.py TP_SIZE PP_SIZE [CASE ...]

Without cases it is all of them, and with such as 1/5 and 3/5 every fifth, from these on: layouts that share the parts
run every model and recipe once. With "gloo" among them tensors pass as on GPUs, through torch.distributed.
Rank 0 prints a JSON object: by case, how far the logits are from one rank's, and whether tokens are equal.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from test_ranks import MODELS, QUANTIZED, Model, baichuan, error, networks_of, quantized, scales_of

from trtbuild.decoder.mapping import Mapping
from trtbuild.engine.config import BuildLimits
from trtbuild.engine.portable import PortableEngine
from trtbuild.errors import UserError
from trtbuild.network.step import Chunk, whole_prompts
from trtbuild.runtime.generation import generate
from trtbuild.runtime.ranks import MpiRanks, NcclRanks
from trtbuild.runtime.ranks_session import RanksSession
from trtbuild.runtime.sampling import SamplingParams
from trtbuild.runtime.session import PortableSession, Session
from trtbuild.runtime.together import obey
from trtbuild.runtime.world import World, world
from trtbuild.tensors.lazy import from_tensor

LIMITS = BuildLimits(max_batch_size=4, max_input_len=300, max_output_len=12)
PROMPTS = (7, 1, 300)
# Weights and how activations are rounded, and the cache.
RECIPES = {
    "int8kv": ("int8 16bit", torch.int8),
    "gptq": ("int4 symmetric", None),
    "awq": ("int4 asymmetric", None),
    "sq": ("int8 static", None),
    "fp8": ("fp8 static", torch.float8_e4m3fn),
    "fp8-dynamic": ("fp8 token", None),
}


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], Model]
    dtype: torch.dtype = torch.float32
    kind: str | None = None
    cache: torch.dtype | None = None

    def session(self, mapping: Mapping, make: Callable[[PortableEngine, Mapping], Session]) -> Session:
        model = self.make()
        scales = scales_of(model.config, self.cache)
        given = model.config, quantized(model, self.kind), self.dtype, scales, [mapping], LIMITS.max_length
        (network,) = networks_of(*given)
        for name, constant in network.constants.items():  # in a row, as they are in a file
            network.constants[name] = from_tensor(constant.load().contiguous())
        return make(PortableEngine(network, LIMITS, torch.device("cpu")), mapping)


# Every family in sizes that four ranks can share, with groups of input channels.
FAMILIES = QUANTIZED | {
    "codellama": partial(MODELS["codellama"], intermediate_size=128),
    "yi": partial(MODELS["yi"], intermediate_size=128),
    "baichuan 7b": partial(baichuan, "v1_7b", intermediate_size=128),
    "baichuan2 7b": partial(baichuan, "v2_7b", intermediate_size=128),
}


def cases() -> Iterator[Case]:
    for name, make in MODELS.items():
        yield Case(name, make)
    for name, make in FAMILIES.items():
        for recipe, (kind, cache) in RECIPES.items():
            yield Case(f"{name} {recipe}", make, torch.float32, kind, cache)
    for dtype in (torch.float16, torch.bfloat16):
        yield Case(f"llama {dtype}", MODELS["llama"], dtype)


def alone(engine: PortableEngine, _: Mapping) -> PortableSession:
    return PortableSession(engine)


def damaged() -> Model:
    """One product of layer 1 is too large for float16, on the last rank alone where ranks share it."""
    model = MODELS["llama"]()
    weight = model.tensors["model.layers.1.mlp.down_proj.weight"].load()
    weight[:, -3:] *= 1e6
    return model


def logits(session: Session) -> torch.Tensor:
    """Of all tokens of ragged prompts, of decode steps, and of a step in which one sequence starts anew."""
    draw = torch.Generator().manual_seed(0)
    rows = [session.prefill([torch.randint(320, (n,), generator=draw).tolist() for n in PROMPTS], all_logits=True)]
    rows = [rows[0].clone()]
    for i in range(3):
        rows.append(session.decode(torch.tensor([5 + i, 6, 7], dtype=torch.int32)).clone())
    mixed = [Chunk([9, 8], 5), Chunk([3], 1, past=4, slot=1, all_logits=True), Chunk([4, 2], 300, past=303, slot=2)]
    rows.append(session.step(mixed).clone())
    rows.append(session.step([Chunk([7, 7, 7], 5, past=2, all_logits=True)]).clone())
    return torch.cat(rows)


def tokens(session: Session) -> list[list[int]]:
    """Greedy, drawn and beams' ones; more prompts than a batch holds."""
    prompts = [[10 * i + j for j in range(1 + i)] for i in range(6)]
    drawn = SamplingParams(8, temperature=0.8, top_p=0.9, repetition_penalty=1.1, seed=3)
    beams = SamplingParams(8, num_beams=2, num_return_sequences=2, eos_token_ids=tuple(range(0, 320, 10)))
    results = [generate(session, prompts, params) for params in (SamplingParams(8), drawn, beams)]
    return [output.output_ids for outputs in results for output in outputs]


def refusal(session: Session) -> str:
    try:
        session.check_finite([[1, 2]], session.step(whole_prompts([[1, 2]])))
    except UserError as refused:
        return str(refused)
    return ""


def refusal_of_generation(session: Session) -> str:
    """With other sequences under way: a pipeline's, or those that are in pages since they are more than a batch."""
    try:
        generate(session, [[1, 2]] * 6, SamplingParams(4))
    except UserError as refused:
        return str(refused)
    return ""


def compare(case: Case, ranks: Session) -> dict:
    one = case.session(Mapping(), alone)
    found = logits(ranks)
    result = {"error": error(found, logits(one)), "tokens": tokens(ranks) == tokens(one)}
    result["vocabulary"] = ranks.vocab_size == one.vocab_size
    exact = logits(Case(case.name, case.make).session(Mapping(), alone))
    return result | {"rounding": error(found, exact), "rounding alone": error(logits(one), exact)}


def chosen(names: list[str]) -> Iterator[Case]:
    broken = Case("damaged", damaged, torch.float16)
    parts = [[*map(int, name.split("/"))] for name in names if name[0].isdecimal()]
    if parts:
        yield from (case for i, case in enumerate(cases(), 1) if any(i % step == first % step for first, step in parts))
        yield broken
    else:
        yield from (case for case in (*cases(), broken) if case.name in names or not {*names} - {"gloo"})


def main(here: World, mapping: Mapping, names: list[str]) -> dict:
    gloo = "gloo" in names
    ranks = NcclRanks(here, mapping, torch.device("cpu")) if gloo else MpiRanks(here)
    here.closing.append(ranks.close if gloo else ranks.forget_sent)
    results = {}
    for case in chosen(names):
        session = case.session(mapping, lambda engine, mapping: RanksSession(engine, ranks, here, mapping))
        if here.rank:
            while (message := here.hear()) != ("next",):
                session.obey(*message)
            continue
        if case.name == "damaged":
            one = refusal(case.session(Mapping(), alone))
            results[case.name] = [refusal(session), one, refusal_of_generation(session), refusal(session)]
        else:
            results[case.name] = compare(case, session)
        here.tell(("next",))
    return results


if __name__ == "__main__":
    here = world()
    tp_size, pp_size, *names = sys.argv[1:]
    results = main(here, Mapping(int(tp_size), int(pp_size), here.rank), names)
    if here.rank == 0:
        print(json.dumps(results))
        here.end()
    else:
        obey(here)
