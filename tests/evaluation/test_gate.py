"""The quality gate."""

import json
import math
import re

import pytest

from trtbuild.errors import UserError
from trtbuild.evaluation.gate import check_gate, gate, verdict

SPREAD = (-1, 1, -1, 1)  # of four articles of 100 tokens; deviation 1.1547, so the interval is 1.837 wide either side


def measured(perplexity: float, spread: float = 0.0, **changes) -> dict:
    """What of a perplexity.json the gate reads; `spread` is how far articles are from it, in nats a token."""
    provenance = {"dataset": {"name": "trtbuild-news", "split": "evaluation", "samples": 4}, "max_input_len": 512}
    hashes = {"engine_sha256": "ab" * 32, "source_sha256": "12" * 32, "tokens_sha256": "34" * 32}
    mean = math.log(perplexity) if perplexity > 0 else 0
    nll = [100 * (mean + spread * way) for way in SPREAD]
    articles = {"nll": nll, "tokens": [100] * 4}
    return {"perplexity": perplexity, "articles": articles, "provenance": provenance | hashes | changes}


@pytest.mark.parametrize(
    ("value", "limit", "increase", "verdict"),
    [
        (10.4, 5.0, 4.0, "passed"),
        (12.5, 25.1, 25.0, "passed"),
        (10.6, 5.0, 6.0, "failed"),
        (9.0, 5.0, -10.0, "passed"),
        (25.0, 150.1, 150.0, "passed"),
    ],
)
def test_verdict(value, limit, increase, verdict):
    result = gate(measured(value), measured(10.0), limit, "fail")
    assert result["increase_percent"] == pytest.approx(increase)
    assert result["verdict"] == verdict
    assert (result["low"], result["high"]) == pytest.approx((increase, increase))
    assert "articles_to_tell" not in result


@pytest.mark.parametrize(
    ("spread", "verdict"), [(0.0, "passed"), (0.0051, "passed"), (0.0053, "undecided"), (0.1, "undecided")]
)
def test_the_whole_interval_decides(spread, verdict):
    """4% with a limit of 5% has room for 0.00957 nats: a spread of 0.0052."""
    result = gate(measured(10.4, spread), measured(10.0), 5.0, "fail")
    assert result["verdict"] == verdict
    width = 1.837386 * spread
    assert result["low"] == pytest.approx(100 * (1.04 * math.exp(-width) - 1), rel=1e-5)
    assert result["high"] == pytest.approx(100 * (1.04 * math.exp(width) - 1), rel=1e-5)
    assert result.get("articles_to_tell") == {0.0053: 5, 0.1: 562}.get(spread)  # with t of 4 and 561 degrees


def test_a_spread_of_both_models_is_none():
    result = gate(measured(10.4, 0.5), measured(10.0, 0.5), 5.0, "fail")
    assert (result["low"], result["high"]) == pytest.approx((4, 4))


def test_content():
    result = gate(measured(12.0, engine_sha256="cd" * 32), measured(10.0), 5.0, "warn")
    numbers = {key: result.pop(key) for key in ("increase_percent", "low", "high")}
    assert numbers == pytest.approx(dict.fromkeys(numbers, 20.0))
    assert result == {
        "baseline": 10.0,
        "baseline_engine": "transformers",
        "value": 12.0,
        "limit_percent": 5.0,
        "articles": 4,
        "verdict": "failed",
        "above_limit": True,
        "policy": "warn",
        "engine_sha256": "cd" * 32,
    }


def test_one_article_has_no_interval():
    sides = measured(10.4), measured(10.0)
    for side in sides:
        side["articles"] = {"nll": side["articles"]["nll"][:1], "tokens": [100]}
    result = gate(*sides, 5.0, "fail")
    assert (result["low"], result["high"], result["verdict"]) == (None, None, "undecided")
    assert result["articles_to_tell"] is None
    assert json.loads(json.dumps(result, allow_nan=False)) == result


@pytest.mark.parametrize(
    ("low", "high", "limit", "verdict", "above"),
    [
        (0.02, 0.04, 0.05, "passed", False),
        (0.02, 0.04, 0.035, "undecided", False),
        (0.02, 0.04, 0.025, "undecided", True),
        (0.02, 0.04, 0.01, "failed", True),
    ],
)
def test_a_limit_of_the_divergence(low, high, limit, verdict, above):
    """The worse of two verdicts holds; perplexity's alone would be passed."""
    value = measured(10.1) | {"divergence": {"mean_kl": 0.03, "low": low, "high": high}}
    assert gate(value, measured(10.0), 5.0, "fail")["verdict"] == "passed"
    result = gate(value, measured(10.0), 5.0, "fail", max_mean_kl=limit)
    assert (result["verdict"], result["above_limit"]) == (verdict, above)
    assert (result["mean_kl"], result["max_mean_kl"]) == (0.03, limit)
    if above:
        with pytest.raises(UserError, match=rf"{verdict}: .* allows 5%; mean KL divergence 0\.0300, at most {limit}"):
            check_gate(result, "x")
    else:
        check_gate(result, "x")
    assert gate(value, measured(5.0), 5.0, "fail", max_mean_kl=0.05)["verdict"] == "failed"


def test_a_limit_of_a_divergence_that_was_not_measured():
    with pytest.raises(UserError, match="max_mean_kl needs the engine's divergence; measure perplexity with --hidden-"):
        gate(measured(10.0), measured(10.0), 5.0, "fail", max_mean_kl=0.05)


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
        "results/m/r: failed: perplexity 12.340, +23.40% [+23.40, +23.40] over the 10.000 of the Hugging Face model; "
        "the recipe allows 5%. Choose a finer recipe, or set its limits or 'gate: warn' in it"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        check_gate(result, "results/m/r")


def test_an_undecided_gate_follows_its_best_estimate(capsys):
    above, below = (gate(measured(value, 0.01), measured(10.0), 5.0, "fail") for value in (10.6, 10.4))
    assert above["verdict"] == below["verdict"] == "undecided"
    with pytest.raises(
        UserError, match=r"undecided: .* allows 5%; 4 articles cannot tell whether that holds, about 9 "
    ):
        check_gate(above, "results/m/r")
    check_gate(below, "results/m/r")
    printed = capsys.readouterr().out
    assert printed.startswith("warning: results/m/r: undecided: perplexity 10.400, +4.00% [+2.11, +5.93] over")
    assert printed.endswith("4 articles cannot tell whether that holds, about 9 would\n")


def test_a_baseline_of_our_own_is_named():
    result = gate(measured(12.0), measured(10.0, engine="portable"), 5.0, "fail")
    with pytest.raises(UserError, match=r"over the 10\.000 of the portable engine in float32"):
        check_gate(result, "results/m/r")


def test_a_failed_gate_that_warns(capsys):
    check_gate(gate(measured(12.0), measured(10.0), 7.5, "warn"), "results/m/r")
    printed = capsys.readouterr().out
    assert printed.startswith(
        "warning: results/m/r: failed: perplexity 12.000, +20.00% [+20.00, +20.00] over the 10.000"
    )
    assert printed.endswith("the recipe allows 7.5%\n")


@pytest.mark.parametrize("policy", ["fail", "warn"])
def test_a_passed_gate_stops_nothing(capsys, policy):
    result = gate(measured(10.0), measured(10.0), 0.0, policy)
    check_gate(result, "x")
    assert capsys.readouterr().out == ""
    line = (
        "passed: perplexity 10.000, +0.00% [+0.00, +0.00] over the 10.000 of the Hugging Face model; the recipe allows"
    )
    assert verdict(result) == f"{line} 0%"
