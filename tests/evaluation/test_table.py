"""The table of a model's recipes."""

import pytest
from result_files import measured, rouge

from trtbuild.errors import UserError
from trtbuild.evaluation.gate import gate
from trtbuild.evaluation.recipes import collect
from trtbuild.evaluation.table import recipe_table
from trtbuild.files import write_json


def table(folder, **weights: str) -> str:
    """Of recipes, or those on a layout, whose weights come from these folders."""
    return recipe_table(collect(folder, {run: {"weights": path} for run, path in weights.items()}))


SPEED = {"time_per_output_token_s": 0.01234, "peak_memory_bytes": 456_700_000}


@pytest.fixture
def results(tmp_path):
    """A model's results: the baseline, a plain recipe and a quantized one with both engines."""
    write_json(tmp_path / "hf/perplexity.json", measured(20.0))
    write_json(tmp_path / "hf/rouge.json", rouge(30, 20))
    for recipe, value in (("fp16", 20.1), ("int8", 21.0)):
        folder = tmp_path / recipe
        divergence = {"mean_kl": 0.00123, "p99_kl": 0.0456, "top1_percent": 97.25}
        write_json(folder / "perplexity.json", measured(value, spread=0.0101) | {"divergence": divergence})
        write_json(folder / "gate.json", gate(measured(value, spread=0.0101), measured(20.0), 5, "fail"))
        write_json(folder / "rouge.json", rouge(29.5, 19.25))
        write_json(folder / "benchmark.json", SPEED)
        outputs = {"rank0.safetensors": {"bytes": 2_500_000}, "rank0.engine": {"bytes": 3_000_000}}
        write_json(tmp_path / recipe / "engine/config.json", {"outputs": outputs, "recipe": {"dtype": "float16"}})
        for kind in ("portable", "tensorrt"):
            (tmp_path / recipe / "logs").mkdir(exist_ok=True)
            (tmp_path / recipe / f"logs/{kind}_engine.rank0.tsv").write_text("s\th:m:s\n4.5\t0:00:04\n")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/quantize.round-int8-1.tsv").write_text("s\th:m:s\n7.25\t0:00:07\n")
    return tmp_path


def test_table(results):
    """The interval of two articles is t of one degree of freedom, 12.706, times 0.0001 nats."""
    lines = table(results, fp16="checkpoint", int8="quantized/round-int8-1").splitlines()
    names = "recipe gate perplexity increase% meanKL p99KL sametoken% ROUGE-1 ROUGE-1difference ROUGE-L"
    names += " ROUGE-Ldifference msatoken peakMB portableMB TensorRTMB quantizes builds"
    assert lines[0].replace(" ", "") == "|" + names.replace(" ", "|") + "|"
    assert lines[2] == "| Hugging Face, float32 |  | 20.00 |  |  |  |  | 30.00 |  | 20.00 |" + "  |" * 7
    rouge = "29.50 | -0.50 [-0.50, -0.50] | 19.25 | -0.75 [-0.75, -0.75]"
    others = f"0.00123 | 0.0456 | 97.2 | {rouge} | 12.34 | 457 | 2.5 | 3.0"
    assert lines[3] == f"| fp16 | passed | 20.10 | +0.50 [+0.37, +0.63] | {others} |  | 9 |"
    assert lines[4] == f"| int8 | undecided | 21.00 | +5.00 [+4.87, +5.13] | {others} | 7 | 9 |"
    assert len({line.count("|") for line in lines}) == 1


def test_ranks_of_a_layout_count_together(results):
    (results / "fp16").rename(results / "fp16@tp2")
    outputs = {f"rank{rank}.safetensors": {"bytes": 1_300_000} for rank in (0, 1)}
    write_json(results / "fp16@tp2/engine/config.json", {"outputs": outputs, "recipe": {"dtype": "float16"}})
    (results / "fp16@tp2/logs/portable_engine.rank1.tsv").write_text("s\th:m:s\n2.5\t0:00:02\n")
    row = table(results, **{"fp16@tp2": "checkpoint"}).splitlines()[-1]
    assert row.startswith("| fp16@tp2 | passed | 20.10 | +0.50 ")
    assert row.endswith(" | 2.6 |  |  | 7 |")


def test_a_rehearsal_says_so(results):
    plain = table(results, fp16="checkpoint")
    assert "ehearsal" not in plain
    write_json(results / "hf/perplexity.json", measured(20.0) | {"rehearsal": True})
    assert table(results, fp16="checkpoint") == "**Rehearsal**: dummy weights, no results.\n\n" + plain


@pytest.mark.parametrize(("file", "value"), [("perplexity", measured(20.0, "9")), ("rouge", rouge(30, 20, "9"))])
def test_results_of_another_model(results, file, value):
    """As when other weights came into a source's folder after the baseline was measured."""
    write_json(results / f"hf/{file}.json", value)
    message = r"fp16 and .*hf: the results are not comparable: the original model \(source_sha256\) is 12 and 9$"
    with pytest.raises(UserError, match=message):
        table(results, fp16="checkpoint")


def test_what_is_not_there_is_empty(results):
    """A recipe that failed its gate has no ROUGE; one may have been built, and nothing else."""
    for name in ("rouge", "benchmark"):
        (results / f"int8/{name}.json").unlink()
    for name in ("perplexity", "gate", "rouge", "benchmark"):
        (results / f"fp16/{name}.json").unlink()
    rows = table(results, int8="checkpoint", fp16="checkpoint", none="checkpoint").splitlines()[-3:]
    quality = ["int8", "undecided", "21.00", "+5.00 [+4.87, +5.13]", "0.00123", "0.0456", "97.2"]
    engine = ["2.5", "3.0", "", "9"]
    assert [row.strip("|").split("|") for row in rows] == [
        [f" {cell} " for cell in cells]
        for cells in (
            [*quality, *[""] * 6, *engine],
            ["fp16", *[""] * 12, *engine],
            ["none", *[""] * 16],
        )
    ]


def test_a_time_that_is_missing(results):
    (results / "fp16/logs/tensorrt_engine.rank0.tsv").write_text("")
    with pytest.raises(UserError, match=r"tensorrt_engine\.rank0\.tsv holds no time"):
        table(results, fp16="checkpoint")
