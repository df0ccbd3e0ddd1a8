"""Beam search against `transformers`', whose sequences and scores it must find."""

import pytest
import torch
from published_models import LLAMA, baichuan_config, baichuan_tensors, llama_tensors
from reference_models import baichuan_logits
from transformers import GenerationMixin, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from trtbuild.decoder.decoder import CacheScales, decoder
from trtbuild.engine.config import BuildLimits
from trtbuild.engine.portable import PortableEngine
from trtbuild.errors import UserError
from trtbuild.models.families import canonical_config, config_from_hugging_face, family_of
from trtbuild.runtime.generation import generate
from trtbuild.runtime.lowered_session import InterpretedSession
from trtbuild.runtime.sampling import SamplingParams
from trtbuild.runtime.session import PortableSession
from trtbuild.tensors.lazy import from_tensor

pytestmark = pytest.mark.usefixtures("one_thread")

LIMITS = BuildLimits(max_batch_size=16, max_input_len=24, max_output_len=16)
PROMPTS = [[5, 9, 40, 41], [7], list(range(100, 120)), [3, 3, 3, 3, 8]]
ENDS = tuple(range(2, 302, 10))  # of 320 tokens, so that beams end all along


def network(config, tensors, version=None, cache=None):
    canonical = canonical_config(config, "test", version)
    model = config_from_hugging_face(canonical, "test")
    lazy = {name: from_tensor(x) for name, x in tensors.items()}
    scales = None
    if cache:
        shape = model.num_hidden_layers, model.num_key_value_heads
        scales = CacheScales(cache, torch.full(shape, 0.03), torch.full(shape, 0.02))
    lazy = family_of(config, "test").canonical_tensors(lazy, canonical)
    return decoder(model, lazy.__getitem__, torch.float32, LIMITS.max_length, scales)


def portable(*args, limits=LIMITS, **options):
    return PortableSession(PortableEngine(network(*args, **options), limits, torch.device("cpu")))


def sharp(tensors):
    """Likely tokens and unlikely ones, as a trained model has."""
    return {name: 4 * x if name == "lm_head.weight" else x for name, x in tensors.items()}


@pytest.fixture(scope="module")
def llama():
    """Six heads over two of keys."""
    tensors = sharp(llama_tensors(LLAMA))
    model = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()
    model.load_state_dict(tensors)
    return portable(LLAMA, tensors), model


class Baichuan(PreTrainedModel, GenerationMixin):
    """The published formula as a model of `transformers`, without a cache."""

    config_class = LlamaConfig

    def __init__(self, config, formula):
        super().__init__(config)
        self.formula, self.unused = formula, torch.nn.Parameter(torch.zeros(1))

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids}

    def forward(self, input_ids, attention_mask=None, **_):
        return CausalLMOutput(logits=torch.stack([self.formula(ids) for ids in input_ids.tolist()]).float())


@pytest.fixture(scope="module")
def baichuan():
    """ALiBi, over five heads."""
    config = baichuan_config("v2_13b", num_attention_heads=5, hidden_size=80)
    tensors = sharp(baichuan_tensors(config))
    model = Baichuan(LlamaConfig(**LLAMA), lambda ids: baichuan_logits(config, tensors, ids, "v2_13b"))
    return portable(config, tensors, "v2_13b"), model


def expected(model, prompts, length, eos, **options):
    """(ids, score) of all sequences of all prompts, which are padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    options = {
        "attention_mask": mask,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": list(eos) or None,
    } | options
    with torch.inference_mode():
        found = model.generate(ids, max_new_tokens=length, return_dict_in_generate=True, output_scores=True, **options)
    results = []
    for row, score in zip(found.sequences[:, longest:].tolist(), found.sequences_scores.tolist(), strict=True):
        end = next((i + 1 for i, token in enumerate(row) if token in eos), length)
        results.append((row[:end], score))
    return results


def check(outputs, expected, eos=()):
    assert [output.output_ids for output in outputs] == [ids for ids, _ in expected]
    assert [output.score for output in outputs] == pytest.approx([score for _, score in expected], rel=1e-5, abs=1e-5)
    for output in outputs:
        assert output.finish_reason == ("eos" if output.output_ids[-1] in eos else "length")


@pytest.mark.parametrize("num_beams", [2, 3, 4, 8])
def test_no_end(llama, num_beams):
    """Several prompts of several lengths; with 8 beams and 4 prompts in batches of 2."""
    session, model = llama
    outputs = generate(session, PROMPTS, SamplingParams(12, num_beams=num_beams, num_return_sequences=num_beams))
    check(outputs, expected(model, PROMPTS, 12, (), num_beams=num_beams, num_return_sequences=num_beams))


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, -0.7, 2.5])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_ends_and_scores(llama, early_stopping, length_penalty):
    session, model = llama
    options = {"num_beams": 4, "num_return_sequences": 3}
    options |= {"length_penalty": length_penalty, "early_stopping": early_stopping}
    outputs = generate(session, PROMPTS, SamplingParams(16, eos_token_ids=ENDS, **options))
    check(outputs, expected(model, PROMPTS, 16, ENDS, **options), ENDS)


def test_more_ends_than_beams(llama):
    """Every other token is one: of twice as many candidates as beams hardly any would go on."""
    session, model = llama
    ends, options = tuple(range(0, 320, 2)), {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 3.0}
    outputs = generate(session, PROMPTS, SamplingParams(16, eos_token_ids=ends, early_stopping="never", **options))
    check(outputs, expected(model, PROMPTS, 16, ends, early_stopping="never", **options), ends)
    assert max(len(output.output_ids) for output in outputs) > 4


def test_options_matter(llama):
    """Or the test above would not see one that is not looked at."""
    session, _ = llama
    found = set()
    for early_stopping, length_penalty in ((False, 1.0), (True, 1.0), ("never", 1.0), (False, 0.0), (False, 2.5)):
        options = {"early_stopping": early_stopping, "length_penalty": length_penalty}
        outputs = generate(session, PROMPTS, SamplingParams(16, eos_token_ids=ENDS, num_beams=4, **options))
        found.add(tuple(tuple(output.output_ids) for output in outputs))
    assert len(found) >= 4
    greedy = generate(session, PROMPTS, SamplingParams(16, eos_token_ids=ENDS))
    assert tuple(tuple(output.output_ids) for output in greedy) not in found


def test_alibi(baichuan):
    """Prompt by prompt, since the formula knows no padding; all at once here."""
    session, model = baichuan
    options = {"num_beams": 3, "num_return_sequences": 2}
    outputs = generate(session, PROMPTS, SamplingParams(8, eos_token_ids=ENDS, **options))
    check(outputs, [one for p in PROMPTS for one in expected(model, [p], 8, ENDS, use_cache=False, **options)], ENDS)


def test_with_penalties_and_what_must_not_come(llama):
    """Which depend on a beam's own tokens, and so go with it when it moves."""
    session, model = llama
    plain = generate(session, PROMPTS, SamplingParams(12, eos_token_ids=ENDS, num_beams=4))
    words = tuple(tuple(output.output_ids[i : i + n]) for output in plain for i, n in ((0, 3), (2, 3), (1, 4), (4, 2)))
    ours = {"repetition_penalty": 1.6, "min_output_len": 5, "bad_words": words}
    theirs = {"repetition_penalty": 1.6, "min_new_tokens": 5, "bad_words_ids": [list(word) for word in words]}
    options = {"num_beams": 4, "num_return_sequences": 4}
    outputs = generate(session, PROMPTS, SamplingParams(12, eos_token_ids=ENDS, **options, **ours))
    check(outputs, expected(model, PROMPTS, 12, ENDS, **options, **theirs), ENDS)


def test_presence_and_frequency_go_with_a_beam(llama):
    """Each score is what the tokens' own penalized log probabilities sum up to."""
    session, model = llama
    params = SamplingParams(10, num_beams=4, num_return_sequences=4, presence_penalty=0.3, frequency_penalty=0.9)
    for number, output in enumerate(generate(session, PROMPTS, params)):
        prompt, ids = PROMPTS[number // 4], output.output_ids
        with torch.inference_mode():
            rows = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total = 0.0
        for i, (row, token) in enumerate(zip(rows, ids, strict=True)):
            times = ids[:i].count(token)
            total += row[token].item() - 0.9 * times - 0.3 * (times > 0)
        assert output.score == pytest.approx(total / len(ids), rel=1e-4)


@pytest.mark.parametrize("cache", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_quantized_cache(cache):
    """The same again, alone and in a batch; scores are those of the tokens along the best beam's own path."""
    session = portable(LLAMA, sharp(llama_tensors(LLAMA)), cache=cache)
    params = SamplingParams(12, eos_token_ids=ENDS, num_beams=4, num_return_sequences=2)
    outputs = generate(session, PROMPTS, params)
    assert generate(session, PROMPTS, params) == outputs
    for number, prompt in enumerate(PROMPTS):
        alone = generate(session, [prompt], params)
        assert [one.output_ids for one in alone] == [one.output_ids for one in outputs[2 * number : 2 * number + 2]]
        ids = alone[0].output_ids
        logits, total = session.prefill([prompt]), 0.0
        for token in ids:
            total += logits[0].log_softmax(-1)[token].item()
            logits = session.decode(torch.tensor([token], dtype=torch.int32)) if token != ids[-1] else logits
        if len(set(ids)) == len(ids):
            assert alone[0].score == pytest.approx(total / len(ids), rel=1e-4)


def test_after_and_before_sequences_in_flight(llama):
    """Whose pages and the beams' caches are one memory."""
    session, model = llama
    options = {"num_beams": 4, "num_return_sequences": 4}
    for _ in range(2):
        many = generate(session, PROMPTS * 5, SamplingParams(8))
        assert [output.output_ids for output in many[:4]] == [output.output_ids for output in many[-4:]]
        outputs = generate(session, PROMPTS, SamplingParams(12, eos_token_ids=ENDS, **options))
        check(outputs, expected(model, PROMPTS, 12, ENDS, **options), ENDS)


def test_refused():
    for params, message in (
        ({"num_beams": 9}, "num_beams is 9; it must be 1 to 8"),
        ({"num_beams": 4, "num_return_sequences": 5}, "num_return_sequences 5 is more than the 4 beams"),
        ({"num_beams": 4, "temperature": 1.0}, "temperature 1.0 draws tokens and beam search does not"),
        ({"num_beams": 4, "stop_words": ("x",)}, "stop words do not end a beam"),
        ({"num_beams": 4, "length_penalty": float("inf")}, "length_penalty is inf"),
        ({"num_beams": 4, "early_stopping": "soon"}, "early_stopping is 'soon'"),
    ):
        with pytest.raises(UserError, match=message):
            SamplingParams(**params)
    small = portable(LLAMA, llama_tensors(LLAMA), limits=BuildLimits(3, 24, 16))
    with pytest.raises(UserError, match="4 beams of 1 prompts are more than the engine's max_batch_size 3"):
        generate(small, [[5]], SamplingParams(4, num_beams=4))
    lowered = InterpretedSession(network(LLAMA, llama_tensors(LLAMA)), LIMITS)
    with pytest.raises(UserError, match="runtime interpreted has no beam search; use --runtime portable"):
        generate(lowered, [[5]], SamplingParams(4, num_beams=4))


def test_not_finite():
    tensors = llama_tensors(LLAMA)
    tensors["model.layers.1.mlp.down_proj.weight"][3] = float("inf")
    session = portable(LLAMA, tensors)
    with pytest.raises(UserError, match="numbers are not finite in layer 1"):
        generate(session, PROMPTS, SamplingParams(4, num_beams=4))
