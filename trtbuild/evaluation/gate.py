"""The quality gate: an engine whose perplexity rose too far is not scored as if nothing had happened."""

import math
from typing import Literal

from trtbuild.engine.config import marker
from trtbuild.errors import UserError
from trtbuild.evaluation.paired import nll_difference
from trtbuild.evaluation.provenance import refuse_different
from trtbuild.files import check_shape

PERPLEXITY = {"perplexity": float, "articles": dict, "provenance": dict}  # of a perplexity.json, what is read here
GATE = {
    **dict.fromkeys(("verdict", "policy", "baseline_engine"), str),
    **dict.fromkeys(("value", "baseline", "increase_percent", "limit_percent"), float),
    "articles": int,
    "above_limit": bool,
}


def gate(
    value: dict,
    baseline: dict,
    max_increase: float,
    policy: Literal["fail", "warn"],
    max_mean_kl: float | None = None,
) -> dict:
    """Compares two `perplexity.json`: the engine's and the baseline's, which is mostly the Hugging Face model.

    Returns the content of `gate.json`: both perplexities; the increase in per cent, `low` and `high` of its 95%
    interval over articles and its limit; the `verdict`, which is "passed" or "failed" where the whole interval is on
    one side of the limit, else "undecided", with how many `articles_to_tell` would do; and whether an increase above
    the limit stops what follows (`policy` "fail") or not ("warn"). With `max_mean_kl` (nats) the engine's divergence is
    judged as well, and the worse verdict holds. Raises `UserError` where the two are of different models, were measured
    on different text, or are no numbers.
    """
    refuse_different([value, baseline])
    if not (0 < value["perplexity"] < math.inf and 0 < baseline["perplexity"] < math.inf):
        raise UserError(f"perplexities {value['perplexity']} and {baseline['perplexity']} are not comparable")
    ours, theirs = value["provenance"], baseline["provenance"]
    difference = nll_difference(value, baseline)
    low, high = map(percent, difference.interval)
    result = {
        "baseline": baseline["perplexity"],
        "baseline_engine": theirs.get("engine", "transformers"),
        "value": value["perplexity"],
        "increase_percent": percent(difference.mean),
        "low": low if difference.articles > 1 else None,  # of a single article there is no interval
        "high": high if math.isfinite(high) else None,
        "limit_percent": max_increase,
        "articles": difference.articles,
        "verdict": _verdict(low, high, max_increase),
        "above_limit": percent(difference.mean) > max_increase,
        "policy": policy,
        "engine_sha256": ours.get("engine_sha256"),
    }
    if result["verdict"] == "undecided":
        result["articles_to_tell"] = difference.articles_to_tell(math.log1p(max_increase / 100))
    if max_mean_kl is not None:
        if "divergence" not in value:
            raise UserError("max_mean_kl needs the engine's divergence; measure perplexity with --hidden-states")
        divergence = value["divergence"]
        check_shape(divergence, {"mean_kl": float}, "the perplexity's divergence")
        kl, low, high = divergence["mean_kl"], divergence.get("low"), divergence.get("high")
        verdicts = {result["verdict"], _verdict(low, high, max_mean_kl) if _known(low, high) else "undecided"}
        result |= {"mean_kl": kl, "mean_kl_low": low, "mean_kl_high": high, "max_mean_kl": max_mean_kl}
        result["verdict"] = next(verdict for verdict in ("failed", "undecided", "passed") if verdict in verdicts)
        result["above_limit"] |= kl > max_mean_kl
    return result | marker(ours.get("model", ""))


def _verdict(low: float, high: float, limit: float) -> str:
    return "passed" if high <= limit else "failed" if low > limit else "undecided"


def _known(low: object, high: object) -> bool:
    """Whether a file's interval has both its ends."""
    return isinstance(low, float | int) and isinstance(high, float | int)


def percent(nats: float) -> float:
    """How much larger a perplexity is whose logarithm is larger by `nats`; what no float holds is infinite."""
    return 100 * math.expm1(nats) if nats < 700 else math.inf


def check_gate(result: dict, where: str) -> None:
    """Raises `UserError` for what is above its limit and stops; says so on standard output for one that warns.

    An undecided gate follows its best estimates, the increase itself and the mean: to stop at all that is not certain
    would stop good recipes for want of articles, and to stop only at what is certain would open the gate to whoever
    measures less text.
    """
    if result["verdict"] == "passed":
        return
    message = f"{where}: {verdict(result)}"
    if result["policy"] == "fail" and result["above_limit"]:
        raise UserError(f"{message}. Choose a finer recipe, or set its limits or 'gate: warn' in it")
    print(f"warning: {message}")


def verdict(result: dict) -> str:
    """A line about a `gate.json`, such as "passed: perplexity 38.297, +0.75% [+0.58, +0.92] over the 38.013 of ..."."""
    baseline = "Hugging Face model" if result["baseline_engine"] == "transformers" else "portable engine in float32"
    line = (
        f"{result['verdict']}: perplexity {result['value']:.3f}, {increase(result)} over the {result['baseline']:.3f} "
        f"of the {baseline}; the recipe allows {result['limit_percent']:g}%"
    )
    if isinstance(kl := result.get("mean_kl"), float):
        line += f"; mean KL divergence {kl:.4f}, at most {result.get('max_mean_kl')}"
    if result["verdict"] != "undecided":
        return line
    articles = "1 article" if result["articles"] == 1 else f"{result['articles']} articles"
    enough = result.get("articles_to_tell")
    would = f"about {enough:,} would" if isinstance(enough, int) else "more would"
    return f"{line}; {articles} cannot tell whether that holds, {would}"


def increase(result: dict) -> str:
    """The increase of a `gate.json` in per cent, with its interval."""
    low, high = result.get("low"), result.get("high")
    interval = f" [{low:+z.2f}, {high:+z.2f}]" if _known(low, high) else ""
    return f"{result['increase_percent']:+z.2f}%{interval}"
