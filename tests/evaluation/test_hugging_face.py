"""The baseline, and summaries made with it and with an engine."""

import json
import shutil
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from trtbuild import progress
from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.datasets import Article, load_articles
from trtbuild.errors import UserError
from trtbuild.evaluation import hugging_face, stages
from trtbuild.evaluation.fake_quantized import load_model
from trtbuild.evaluation.hugging_face import HuggingFaceModel, check_places, spread
from trtbuild.evaluation.stages import measure_perplexity, rouge_table, score_summaries, summarize_articles
from trtbuild.evaluation.summarization import read_summaries
from trtbuild.files import sha256
from trtbuild.runtime.sampling import SamplingParams

NEWS = {"name": "trtbuild-news", "split": "evaluation", "samples": 2}


def test_logits_and_generation(tiny_checkpoint):
    baseline, model = (
        HuggingFaceModel(tiny_checkpoint, device="cpu"),
        AutoModelForCausalLM.from_pretrained(tiny_checkpoint),
    )
    ids = torch.randint(2, 258, (9,)).tolist()
    with torch.inference_mode():
        assert baseline.logits(ids).equal(model(torch.tensor([ids])).logits[0])
    (output,) = baseline.generate([ids], SamplingParams(5))
    greedy = model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert output.output_ids == greedy[0, 9:].tolist()
    assert output.finish_reason == "length"
    (stopped,) = baseline.generate([ids], SamplingParams(5, eos_token_ids=(output.output_ids[2],)))
    assert stopped.output_ids == output.output_ids[: output.output_ids.index(output.output_ids[2]) + 1]
    assert stopped.finish_reason == "eos"


def test_a_long_load_is_not_silent(tiny_checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.1)
    monkeypatch.setattr(hugging_face, "load_model", lambda *args: time.sleep(0.35) or load_model(*args))
    HuggingFaceModel(tiny_checkpoint, device="cpu")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("the Hugging Face model:   0%")
    assert lines[-1].startswith("the Hugging Face model: 100%")


def test_batches_generate_what_one_prompt_at_a_time_does(tiny_checkpoint, monkeypatch):
    baseline = HuggingFaceModel(tiny_checkpoint, device="cpu")
    prompts = [torch.randint(2, 258, (n,)).tolist() for n in (9, 1, 30, 5, 17, 5, 12, 3, 21, 8)]
    alone = [baseline.generate([prompt], SamplingParams(12))[0] for prompt in prompts]
    params = SamplingParams(12, eos_token_ids=(alone[0].output_ids[3], alone[4].output_ids[7]))
    alone = [baseline.generate([prompt], params)[0] for prompt in prompts]
    assert {output.finish_reason for output in alone} == {"eos", "length"}
    sizes, ended, tokens = [], {}, []
    for room in (2, 1 << 40):
        monkeypatch.setattr(type(baseline.checkpoint.config), "parameters", room, raising=False)
        watch = {"on_token": lambda i, _: tokens.append(i), "on_output": ended.__setitem__, "say": sizes.append}
        assert baseline.generate(prompts, params, **watch) == alone
        assert [ended[i] for i in range(10)] == alone
    assert sizes == ["batch 1"] * 10 + ["batch 8", "batch 2"]
    assert {*tokens} == {*range(10)}


def test_interrupted_summaries_go_on_where_they_were(tiny_checkpoint, tmp_path, monkeypatch):
    """What was there is not generated again, and the result is the same."""

    def summaries(name: str, **changes: object) -> bytes:
        path = tmp_path / name / "summaries.jsonl"
        options = {"dataset": NEWS | {"samples": 6}, "prompt": "{article}", "chat": False, "max_output_len": 4}
        summarize_articles(output=path, checkpoint_dir=tiny_checkpoint, max_input_len=40, **options | changes)
        return path.read_bytes()

    whole = summaries("whole")
    generate, seen = HuggingFaceModel._generate_batch, []

    def one_at_a_time(self, lengths):
        return ([i] for i in range(len(lengths)))

    def watched(self, batch, prompts, *others):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(prompts[batch[0]])
        return generate(self, batch, prompts, *others)

    monkeypatch.setattr(HuggingFaceModel, "_batches", one_at_a_time)
    monkeypatch.setattr(HuggingFaceModel, "_generate_batch", watched)
    with pytest.raises(KeyboardInterrupt):
        summaries("again")
    assert [path.name for path in (tmp_path / "again").iterdir()] == [".summaries.jsonl.partial"]
    first, seen[:] = [*seen], seen[:1]
    with pytest.raises(KeyboardInterrupt):
        summaries("again")
    assert not [prompt for prompt in seen[1:] if prompt in first]
    seen.clear()
    assert summaries("again") == whole
    assert len(seen) == 1
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["summaries.jsonl", "summaries.meta.json"]


# A baseline that is larger than one GPU, as far as it can be tested without


@pytest.fixture
def gpus(monkeypatch):
    """GPUs with so much free memory."""

    def set_free(*sizes: float) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(sizes))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (int(sizes[i]), 80e9))

    return set_free


def test_a_baseline_is_spread_where_one_gpu_has_no_room(tiny_checkpoint, gpus):
    checkpoint = Checkpoint(tiny_checkpoint)
    size = sum(x.nbytes for x in checkpoint.tensors.values())  # float32
    for free in ((1.2 * size,), (1.2 * size, size)):
        gpus(*free)
        assert spread(checkpoint, "float32") == {}
    gpus(0.6 * size, 0.6 * size)
    assert spread(checkpoint, "float16") == {}
    options = spread(checkpoint, "float32")
    assert options == {"device_map": "auto", "max_memory": dict.fromkeys((0, 1), int(0.9 * int(0.6 * size)))}


def test_a_baseline_without_room(tiny_checkpoint, gpus, monkeypatch):
    checkpoint = Checkpoint(tiny_checkpoint)
    for free, has in (((1e5,), "the GPU has 0.0 GB free"), ((1e5, 1e5, 1e5), "the 3 GPUs have 0.0 GB free")):
        gpus(*free)
        with pytest.raises(UserError, match=rf"weights take 0.0 GB in float32, and {has}; use more GPUs, a smaller"):
            spread(checkpoint, "float32")
    gpus(3e5, 3e5)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"accelerate, .* is not installed; 'pip install trtbuild\[workflow\]'"):
        spread(checkpoint, "float32")


def test_modules_without_a_gpu_are_refused():
    assert check_places({"model.embed_tokens": 0, "model.layers.0": 1}) == [0, 1]
    with pytest.raises(UserError, match=r"not in whole layers: there is no GPU with room for model\.norm; use more"):
        check_places({"model.layers": 0, "model.norm": "disk", "lm_head": "cpu"})


def test_a_model_in_parts_computes_the_same(tiny_checkpoint):
    """Parts that accelerate moves to where they are computed; here from the disk."""
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    ids = torch.randint(2, 258, (1, 9))
    with torch.inference_mode():
        logits = [
            load_model(Checkpoint(tiny_checkpoint), torch.float32, **options)(ids).logits
            for options in ({}, {"device_map": places})
        ]
    assert logits[0].equal(logits[1])


def test_empty_prompt(tiny_checkpoint):
    with pytest.raises(UserError, match="prompt 1 is empty"):
        HuggingFaceModel(tiny_checkpoint, device="cpu").generate([[5], []], SamplingParams(2))


def test_baseline_and_engine_write_the_same_summaries(tiny_checkpoint, tiny_engine, tmp_path):
    """Both cut the articles to 32 tokens and continue greedily; the files differ in their provenance alone."""
    common = {"dataset": NEWS, "prompt": "{article} TL;DR:", "chat": False, "max_output_len": 6, "device": "cpu"}
    for name, options in (("engine", {"engine_dir": tiny_engine}), ("hf", {"max_input_len": 32, "model": "tiny"})):
        path = tmp_path / f"{name}.jsonl"
        summarize_articles(output=path, checkpoint_dir=tiny_checkpoint, **common, **options)
    engine, engine_origin = read_summaries(tmp_path / "engine.jsonl")
    hf, hf_origin = read_summaries(tmp_path / "hf.jsonl")
    assert engine == hf
    assert all(20 <= record["input_tokens"] <= 32 and len(record["output_ids"]) <= 6 for record in engine)
    assert engine_origin["engine_sha256"] == sha256(tiny_engine / "rank0.safetensors")
    assert hf_origin["engine_sha256"] == sha256(tiny_checkpoint / "model.safetensors")
    assert (engine_origin["engine"], hf_origin["engine"]) == ("portable", "transformers")
    assert engine_origin.pop("options") == {"dtype": "float32"}
    different = {key for key in engine_origin if engine_origin[key] != hf_origin[key]}
    assert different == {"engine", "engine_sha256"}

    scores = [score_summaries(tmp_path / f"{name}.jsonl") for name in ("engine", "hf")]
    assert scores[0]["rouge1"] == scores[1]["rouge1"]
    assert scores[0]["samples"] == 2
    _, first, second, difference = rouge_table(scores).splitlines()
    assert difference.split() == ["difference", *["+0.00", "[+0.00,", "+0.00]"] * 4]
    assert first.startswith("portable float32")
    assert second.startswith("transformers float32")
    assert f"{scores[0]['rouge1']['mean']:.2f}" in first


def test_baseline_and_engine_have_the_same_perplexity(tiny_checkpoint, tiny_engine, monkeypatch):
    beginning = [Article(a.id, a.article[:300], a.highlights) for a in load_articles(**NEWS)]
    monkeypatch.setattr(stages, "load_articles", lambda **dataset: beginning)
    options = {"checkpoint_dir": tiny_checkpoint, "dataset": NEWS, "device": "cpu"}
    engine = measure_perplexity(engine_dir=tiny_engine, **options)
    hf = measure_perplexity(max_input_len=32, **options)
    assert engine["tokens"] == hf["tokens"] > 500
    assert engine["perplexity"] == pytest.approx(hf["perplexity"], rel=1e-5)
    assert 250 < hf["perplexity"] < 500  # random weights know nothing of 320 tokens


@pytest.mark.parametrize("engine", [True, False])
def test_no_output_is_asked_for(tiny_checkpoint, tiny_engine, tmp_path, engine):
    with pytest.raises(UserError, match="max_output_len is 0"):
        summarize_articles(
            output=tmp_path / "s.jsonl",
            checkpoint_dir=tiny_checkpoint,
            engine_dir=tiny_engine if engine else None,
            dataset=NEWS,
            prompt="{article}",
            chat=False,
            max_output_len=0,
            max_input_len=32,
        )
    assert list(tmp_path.iterdir()) == []


def test_the_baseline_is_greedy_whatever_the_checkpoint_suggests(tiny_checkpoint, tmp_path):
    """Penalties of a generation_config.json would make the baseline another decoding than the engine's."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    prompt = [5, 6, 7, 8]
    (plain,) = HuggingFaceModel(folder, device="cpu").generate([prompt], SamplingParams(8))
    suggestion = {"repetition_penalty": 5.0, "suppress_tokens": plain.output_ids[:2]}
    (folder / "generation_config.json").write_text(json.dumps(suggestion))
    assert HuggingFaceModel(folder, device="cpu").generate([prompt], SamplingParams(8)) == [plain]


def test_a_key_that_only_transformers_reads(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"use_cache": [1]}))
    with pytest.raises(
        UserError, match=r"^transformers cannot read .*copy/config\.json \(.*use_cache.*\); fetch the files"
    ):
        HuggingFaceModel(folder, device="cpu").generate([[5]], SamplingParams(1))
