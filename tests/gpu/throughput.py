"""How many tokens a second an engine generates when as many sequences run as fit, beside what the GPU could do.

    python tests/gpu/throughput.py --recipes fp8 --cases 128/128 128/2048 2048/128 2048/2048 mixed
    python tests/gpu/throughput.py --recipes fp16 int8kv int4-int8kv --cases 128/128 2048/128 --peers

LLaMA-7B's shapes with dummy weights, as `run.py` makes them. A case is the length of every prompt and of every output,
or `mixed`: 2,000 requests, prompts log-normal around 700 tokens, outputs of 20 to 200, evenly. Requests are as many as
fit at a time, `--pools` times; `--seconds` ends a case early, and what came until then counts. Graphs are captured
before.

The floor is the time for the same steps of a GPU that reads each step's weights and caches once at the bandwidth of a
large copy, and multiplies at `RATES`, which cuBLAS reached for LLaMA-7B's products of 2,048 tokens; products take the
longer of the two, attention comes on top. `host` is what the host does for a generation step, and `busy` its share of
the time in which it does not wait for the device.

`--check` first compares tokens in flight with those of one prompt at a time, in a model of two layers.
`--peers` times `transformers`' `generate` in float16 with as many requests a batch as there is memory for.
"""

import argparse
import gc
import sys
import time
import traceback
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from run import MODELS, RECIPES, copy_bandwidth, recipe_session

from trtbuild.engine.config import BuildLimits
from trtbuild.models.config import ModelConfig
from trtbuild.models.families import canonical_config, config_from_hugging_face
from trtbuild.runtime.generation import generate
from trtbuild.runtime.in_flight import InFlight, schedule
from trtbuild.runtime.paged_steps import CAPTURED, Rows
from trtbuild.runtime.ranks_session import RanksSession
from trtbuild.runtime.sampling import SamplingParams
from trtbuild.runtime.scheduler import Sequence
from trtbuild.runtime.session import PortableSession

RECIPES["int4-int8kv"] = ("int4", "16bit", torch.int8)
RATES = {"fp8": 1340e12, "sq": 816e12}  # operations a second of products; the others' are in 16 bits
RATE = 730e12
MIXED = 2000
HEADINGS = (
    "| recipe | in/out | tokens/s | mean batch | s | floor s | x floor | chunk steps | token steps | "
    "host ms a step | busy |"
)


class TimeIsUp(Exception):
    pass


class Measured(InFlight):
    """Counts steps, what they read and multiply, and the host's time."""

    def __init__(self, config: ModelConfig, recipe: str, bandwidth: float, session: PortableSession, *given) -> None:
        super().__init__(session, *given)
        heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        hidden, layers = config.hidden_size, config.num_hidden_layers
        self.numbers = layers * hidden * (width * 2 * (heads + kv_heads) + 3 * config.intermediate_size)
        self.head = hidden * config.vocab_size
        self.pair = 4 * layers * heads * width  # operations of attention for a pair of positions
        ranks = session.mapping.tp_size if isinstance(session, RanksSession) else 1  # each has a part of all these
        self.bandwidth, self.rate, self.rate_of_pairs = bandwidth, ranks * RATES.get(recipe, RATE), ranks * RATE
        self.floor_of_chunks = self.floor_of_tokens = self.host = self.waited = 0.0
        self.chunk_steps = self.token_steps = self.rows = 0
        self.marks: list[tuple[str, torch.cuda.Event]] = []

    def products(self, operations: float) -> float:
        return max(self.session.weight_bytes / self.bandwidth, operations / self.rate)

    def _enter(self, parts):
        tokens = sum(len(part) for _, part in parts)
        pairs = sum((part.start + part.stop) / 2 * len(part) for _, part in parts)
        self.floor_of_chunks += self.products(2 * (tokens * self.numbers + len(parts) * self.head))
        self.floor_of_chunks += pairs * self.pair / self.rate_of_pairs
        self.chunk_steps += 1
        step = super()._enter(parts)
        self._mark("chunks")
        return step

    def _generate(self):
        start = time.perf_counter()
        step = super()._generate()
        self.host += time.perf_counter() - start
        count = len(step.sequences)
        read = int(self._positions[:count].sum()) * self.session.bytes_per_position
        self.floor_of_tokens += self.products(2 * count * (self.numbers + self.head)) + read / self.bandwidth
        self.token_steps += 1
        self.rows += count
        self._mark("tokens")
        return step

    def _mark(self, kind: str) -> None:
        if self.session.device.type == "cuda":
            self.marks.append((kind, torch.cuda.Event(enable_timing=True)))
            self.marks[-1][1].record()

    def seconds(self, kind: str) -> float:
        """From the end of the step before to the end of each of this kind, on the device's clock."""
        pairs = pairwise(self.marks)
        return sum(before.elapsed_time(after) for (_, before), (own, after) in pairs if own == kind) / 1e3

    def _wait(self, step):
        start = time.perf_counter()
        super()._wait(step)
        self.waited += time.perf_counter() - start

    def _receive(self, step):
        start, waited = time.perf_counter(), self.waited
        try:
            super()._receive(step)
        finally:
            self.host += time.perf_counter() - start - (self.waited - waited)


def requests(case: str, config: ModelConfig, count: int) -> list[Sequence]:
    draw = torch.Generator().manual_seed(0)
    if case == "mixed":
        lengths = (torch.randn(count, generator=draw) * 0.5).exp().mul(700).clamp(16, 2048).int().tolist()
        outputs = torch.randint(20, 201, (count,), generator=draw).tolist()
    else:
        lengths, outputs = ([int(x)] * count for x in case.split("/"))
    prompts = [torch.randint(1, config.vocab_size, (n,), generator=draw).tolist() for n in lengths]
    return [Sequence(i, prompt, m) for i, (prompt, m) in enumerate(zip(prompts, outputs, strict=True))]


def measure(session, config, recipe: str, case: str, args, bandwidth: float) -> None:
    cuda = session.device.type == "cuda"
    params = SamplingParams(4096)
    scheduler = schedule(session, requests(case, config, max(args.requests, MIXED)), params)
    while scheduler.next_chunks():
        pass
    at_once = len(scheduler.running) + len(scheduler.entering)
    count = args.requests or (MIXED if case == "mixed" else int(at_once * args.pools))
    drawn, deadline = [0] * count, float("inf")
    said: list[str] = []

    def take(sequence: Sequence, token: int) -> bool:
        drawn[sequence.index] += 1
        if time.perf_counter() > deadline:
            raise TimeIsUp
        return drawn[sequence.index] == sequence.max_output_len

    def flight(sequences: list[Sequence]) -> Measured:
        drawn[:] = [0] * count
        given = session, schedule(session, sequences, params), params, take, said.append
        return Measured(config, recipe, bandwidth, *given)

    warm = flight(requests(case, config, min(count, 64)))
    for sequence in warm.scheduler.waiting:
        sequence.max_output_len = 2
    warm.run()
    start, rows = time.perf_counter(), session.paged_steps.sizes.rows
    ends = [1, max(sequence.positions for sequence in requests(case, config, count))]
    with torch.inference_mode():
        session.paged("arrange", Rows.new(session.paged_steps.sizes).buffer.numpy())
        sizes = {session.paged_steps.padded(size) for size in (CAPTURED if case == "mixed" else (min(count, rows),))}
        for size in sorted(size for size in sizes if size <= rows):
            for longest in ends:  # short sequences' steps are captured apart
                session.paged("generation", size, longest)
    captured = time.perf_counter() - start
    flown = flight(requests(case, config, count))
    flown.scheduler.budget = args.budget or flown.scheduler.budget
    flown._mark("start")
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start, early = time.perf_counter(), ""
    deadline = start + args.seconds
    try:
        flown.run()
    except TimeIsUp:
        early = f", ended early with {sum(map(bool, drawn))} requests begun"
    if cuda:
        torch.cuda.synchronize()
    seconds, floor = time.perf_counter() - start, flown.floor_of_chunks + flown.floor_of_tokens
    steps = max(1, flown.token_steps)
    print(
        f"| {recipe} | {case} | {sum(drawn) / seconds:,.0f} | {flown.rows / steps:.0f} | {seconds:.2f} | {floor:.2f} | "
        f"{seconds / floor:.2f} | {flown.chunk_steps} | {flown.token_steps} | {flown.host / steps * 1e3:.2f} | "
        f"{1 - flown.waited / seconds:.0%} |",
        flush=True,
    )
    peak = ""
    if cuda:
        sizes = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), torch.cuda.mem_get_info()[0]
        peak = ", {:.1f} GB in tensors and {:.1f} in torch at most, {:.1f} free".format(*(size / 1e9 for size in sizes))
    print(
        f"  {said[-1]}; {count} requests, {sum(drawn)} tokens{early}; "
        f"chunks {flown.seconds('chunks'):.2f} s, floor {flown.floor_of_chunks:.2f}; "
        f"tokens {flown.seconds('tokens'):.2f} s, floor {flown.floor_of_tokens:.2f}; "
        f"graphs captured in {captured:.1f} s{peak}",
        flush=True,
    )


def step_times(session: PortableSession) -> None:
    """Of generation steps of every captured size, whose sequences are short."""
    sizes = session.paged_steps.sizes
    found = []
    for size in (size for size in CAPTURED if 64 <= size <= sizes.rows):
        with torch.inference_mode():
            session.paged("arrange", Rows.new(sizes).buffer.numpy())
            session.paged("generation", size, 1)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(10):
                session.paged("generation", size, 1)
            end.record()
            end.synchronize()
        found.append(f"{size}: {start.elapsed_time(end) / 10:.2f}")
    print("  ms of steps of so many sequences of one position: " + ", ".join(found), flush=True)


def tokens(session: PortableSession, prompts: list[list[int]], size: int) -> list[list[int]]:
    """In calls of so many prompts."""
    parts = (prompts[i : i + size] for i in range(0, len(prompts), size))
    return [output.output_ids for part in parts for output in generate(session, part, SamplingParams(48))]


def check(config: ModelConfig, device: str) -> None:
    """Tokens in flight beside those of one prompt at a time."""
    for recipe in ("fp16", "int8kv", "fp8") if device == "cuda" else ("fp16",):
        session = recipe_session(config, recipe, BuildLimits(20, 512, 48), device)
        draw = torch.Generator().manual_seed(1)
        begin = torch.randint(1, 256, (150,), generator=draw).tolist()
        prompts = [torch.randint(1, 256, (1 + 13 * i % 300,), generator=draw).tolist() for i in range(40)]
        prompts = [begin + prompt if i % 3 == 0 else prompt for i, prompt in enumerate(prompts)]

        sizes = {"in flight": 40, "again": 40, "batches of 20": 20, "of 2": 2}
        alone = tokens(session, prompts, 1)
        for name, size in sizes.items():
            found = tokens(session, prompts, size)
            first = sum(a[0] == b[0] for a, b in zip(found, alone, strict=True))
            same = sum(a == b for x, y in zip(found, alone, strict=True) for a, b in zip(x, y, strict=True))
            print(f"{recipe}, {name} as alone: {first} of 40 first tokens, {same} of {40 * 48} tokens", flush=True)
        del session
        gc.collect()


class Clock:
    """When each token came, for `generate`, which it stops at a time; it waits for every token."""

    def __init__(self, seconds: float) -> None:
        self.marks, self.seconds = [time.perf_counter()], seconds

    def __call__(self, ids: torch.Tensor, scores: object, **kwargs) -> torch.Tensor:
        torch.cuda.synchronize()
        self.marks.append(time.perf_counter())
        late = self.marks[-1] - self.marks[0] > self.seconds
        return torch.full((len(ids),), late, device=ids.device)


def peers(published: dict, name: str, cases: list[str], seconds: float) -> None:
    """Static batches, in the order of the requests, of as many as there is memory for; outputs are as long as a batch's
    longest, and what is beyond a request's own does not count. A case ends with the batch in which its time ends.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    begin, config = time.perf_counter(), config_from_hugging_face(published, name)
    sizes = canonical_config(published, name)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(sizes.pop("model_type"), **sizes), dtype=torch.float16
        ).eval()
    model.generation_config.eos_token_id = None
    position = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # bytes of the cache
    token = 6 * config.intermediate_size + 16 * config.hidden_size  # of a prompt, in one layer
    print(f"transformers fp16: there in {time.perf_counter() - begin:.1f} s", flush=True)

    def generated(batch: list[Sequence], most: float) -> Clock:
        longest = max(len(sequence.prompt) for sequence in batch)
        new = max(sequence.max_output_len for sequence in batch)
        padding = [longest - len(sequence.prompt) for sequence in batch]  # on the left
        ids = torch.tensor([[0] * n + x.prompt for n, x in zip(padding, batch, strict=True)], device="cuda")
        mask = (torch.arange(longest) >= torch.tensor(padding)[:, None]).long().cuda()
        options = {
            "attention_mask": mask,
            "do_sample": False,
            "pad_token_id": 0,
            "stopping_criteria": [clock := Clock(most)],
        }
        model.generate(ids, max_new_tokens=new, min_new_tokens=new, **options)
        return clock

    for case in cases:
        sequences = requests(case, config, MIXED)
        generated(sequences[:1], 1.0)
        free = torch.cuda.mem_get_info()[0] * 0.9
        room = max(position * x.positions + token * len(x.prompt) for x in sequences)
        count = max(1, int(free / room))
        start, taken, batches, first = time.perf_counter(), 0, 0, 0.0
        while sequences and time.perf_counter() - start < seconds:
            clock = None
            with suppress(torch.cuda.OutOfMemoryError):
                clock = generated(sequences[:count], seconds)
            if clock is None:
                gc.collect()
                torch.cuda.empty_cache()
                print(f"transformers fp16, {case}: no memory for {count} requests at a time", flush=True)
                start, taken, batches, first, count = time.perf_counter(), 0, 0, 0.0, count * 3 // 4
                continue
            batch, sequences = sequences[:count], sequences[count:]
            tokens = len(clock.marks) - 1
            taken += sum(min(x.max_output_len, tokens) for x in batch)
            batches, first = batches + 1, first + clock.marks[1] - clock.marks[0]
            took = time.perf_counter() - start
            print(
                f"| transformers fp16 | {case} | {taken / took:,.0f} | {count} | {took:.2f} | batches {batches}, first "
                f"tokens {first:.2f} s, the last batch {tokens} of {max(x.max_output_len for x in batch)} tokens |",
                flush=True,
            )
            if case != "mixed":
                break
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-7b", metavar="NAME", help="of config/models.yaml")
    parser.add_argument("--layers", type=int, help="of the model; default: all")
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=["fp8"])
    parser.add_argument("--cases", nargs="+", default=["128/128", "2048/128", "mixed"])
    parser.add_argument("--pools", type=float, default=1)
    parser.add_argument("--requests", type=int, default=0, help="instead, so many")
    parser.add_argument("--budget", type=int, default=0, help="tokens of a step of chunks")
    parser.add_argument("--steps", action="store_true", help="time generation steps by their number of sequences")
    parser.add_argument("--seconds", type=float, default=120, help="of a case at most")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--peers", action="store_true")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    published = MODELS[args.model]["config"] | ({"num_hidden_layers": args.layers} if args.layers else {})
    config = config_from_hugging_face(published, args.model)
    cuda = args.device == "cuda"
    if args.check:
        check(config_from_hugging_face(published | {"num_hidden_layers": 2}, args.model), args.device)
    bandwidth = copy_bandwidth() if cuda else 1e10
    name = torch.cuda.get_device_name() if cuda else "CPU"
    print(f"{args.model} on {name}, torch {torch.__version__}, copy bandwidth {bandwidth / 1e12:.2f} TB/s", flush=True)
    print(HEADINGS)
    for recipe in args.recipes:
        start = time.perf_counter()
        session = recipe_session(config, recipe, BuildLimits(1, 2048, 2048), args.device)
        print(
            f"{recipe}: {session.weight_bytes / 1e9:.2f} GB of weights, {time.perf_counter() - start:.1f} s", flush=True
        )
        for case in args.cases:
            try:
                measure(session, config, recipe, case, args, bandwidth)
            except Exception:  # no reason to lose the others
                traceback.print_exc(file=sys.stdout)
        if args.steps:
            step_times(session)
        del session
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    if args.peers:
        peers(published, args.model, args.cases, args.seconds)


if __name__ == "__main__":
    main()
