"""The quality gate."""

import math

import pytest

from trtbuild.errors import UserError
from trtbuild.evaluation.gate import check_gate, gate


def measured(perplexity: float, **changes) -> dict:
    """What of a perplexity.json the gate reads."""
    provenance = {"dataset": {"name": "trtbuild-news", "split": "evaluation", "samples": 16}, "max_input_len": 512}
    hashes = {"engine_sha256": "ab" * 32, "source_sha256": "12" * 32, "tokens_sha256": "34" * 32}
    return {"perplexity": perplexity, "provenance": provenance | hashes | changes}


@pytest.mark.parametrize(
    ("value", "limit", "increase", "verdict"),
    [
        (10.4, 5.0, 4.0, "passed"),
        (12.5, 25.0, 25.0, "passed"),
        (10.6, 5.0, 6.0, "failed"),
        (9.0, 5.0, -10.0, "passed"),
        (25.0, 150.0, 150.0, "passed"),
    ],
)
def test_verdict(value, limit, increase, verdict):
    result = gate(measured(value), measured(10.0), limit, "fail")
    assert result["increase_percent"] == pytest.approx(increase)
    assert result["verdict"] == verdict


def test_content():
    result = gate(measured(12.0, engine_sha256="cd" * 32), measured(10.0), 5.0, "warn")
    assert result["increase_percent"] == pytest.approx(20.0)
    assert {key: value for key, value in result.items() if key != "increase_percent"} == {
        "baseline": 10.0,
        "baseline_engine": "transformers",
        "value": 12.0,
        "limit_percent": 5.0,
        "verdict": "failed",
        "gate": "warn",
        "engine_sha256": "cd" * 32,
    }


def test_a_rehearsal_says_so():
    assert gate(measured(10.0, model="rehearsal/m"), measured(10.0), 5.0, "warn")["rehearsal"] is True
    assert "rehearsal" not in gate(measured(10.0, model="m"), measured(10.0), 5.0, "warn")


@pytest.mark.parametrize(("value", "baseline"), [(math.nan, 10.0), (10.0, math.nan), (math.inf, 10.0)])
def test_what_is_no_number_is_refused(value, baseline):
    with pytest.raises(UserError, match=f"perplexities {value} and {baseline} are not comparable"):
        gate(measured(value), measured(baseline), 5.0, "fail")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": {"name": "cnn_dailymail"}}, "not comparable: dataset is .*cnn_dailymail.* and .*trtbuild-news"),
        ({"max_input_len": 256}, "not comparable: max_input_len is 256 and 512"),
        (
            {"source_sha256": "9" * 64},
            r"not comparable: the original model \(source_sha256\) is 9{12} and 121212121212$",
        ),
        ({"source_sha256": None}, r"does not tell which model it is of \(provenance\.source_sha256\); make it again"),
        ({"articles_sha256": "9" * 64}, r"the text of the articles \(articles_sha256\) is 9{12} and None"),
        (
            {"tokens_sha256": "9" * 64},
            r"tokenizer and chat template made of the text \(tokens_sha256\) is 9{12} and 34",
        ),
    ],
)
def test_other_models_and_text_are_not_compared(changes, message):
    with pytest.raises(UserError, match=message):
        gate(measured(10.0, **changes), measured(10.0), 5.0, "fail")


def test_a_failed_gate_stops():
    result = gate(measured(12.34), measured(10.0), 5.0, "fail")
    message = (
        r"results/m/r: perplexity 12\.340 is 23\.4% above the 10\.000 of the Hugging Face model; the recipe allows 5%\."
        r" Choose a finer recipe, or set max_perplexity_increase or 'gate: warn' in it"
    )
    with pytest.raises(UserError, match=message):
        check_gate(result, "results/m/r")


def test_a_baseline_of_our_own_is_named():
    result = gate(measured(12.0), measured(10.0, engine="portable"), 5.0, "fail")
    with pytest.raises(UserError, match=r"above the 10\.000 of the portable engine in float32"):
        check_gate(result, "results/m/r")


def test_a_failed_gate_that_warns(capsys):
    check_gate(gate(measured(12.0), measured(10.0), 7.5, "warn"), "results/m/r")
    printed = capsys.readouterr().out
    assert printed.startswith("warning: results/m/r: perplexity 12.000 is 20.0% above the 10.000")
    assert printed.endswith("the recipe allows 7.5%\n")


@pytest.mark.parametrize("kind", ["fail", "warn"])
def test_a_passed_gate_says_nothing(capsys, kind):
    check_gate(gate(measured(10.0), measured(10.0), 0.0, kind), "x")
    assert capsys.readouterr().out == ""
