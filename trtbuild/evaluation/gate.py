"""The quality gate: an engine whose perplexity rose too far is not scored as if nothing had happened."""

import math

from trtbuild.engine.config import marker
from trtbuild.errors import UserError
from trtbuild.evaluation.provenance import refuse_different

PERPLEXITY = {"perplexity": float, "provenance": dict}  # of a perplexity.json, what is read here
GATE = {
    "verdict": str,
    "gate": str,
    "baseline_engine": str,
    **dict.fromkeys(("value", "baseline", "increase_percent", "limit_percent"), float),
}


def gate(value: dict, baseline: dict, max_increase: float, gate: str) -> dict:
    """Compares two `perplexity.json`: the engine's and the baseline's, which is mostly the Hugging Face model.

    Returns the content of `gate.json`: both perplexities, the increase and its limit in per cent, the verdict, and
    whether a failed one stops what follows (`gate` "fail") or not ("warn"). Raises `UserError` where the two are
    of different models, were measured on different text, or are no numbers.
    """
    refuse_different([value, baseline])
    if not (0 < value["perplexity"] < math.inf and 0 < baseline["perplexity"] < math.inf):
        raise UserError(f"perplexities {value['perplexity']} and {baseline['perplexity']} are not comparable")
    ours, theirs = value["provenance"], baseline["provenance"]
    increase = 100 * (value["perplexity"] / baseline["perplexity"] - 1)
    return {
        "baseline": baseline["perplexity"],
        "baseline_engine": theirs.get("engine", "transformers"),
        "value": value["perplexity"],
        "increase_percent": increase,
        "limit_percent": max_increase,
        "verdict": "passed" if increase <= max_increase else "failed",
        "gate": gate,
        "engine_sha256": ours.get("engine_sha256"),
    } | marker(ours.get("model", ""))


def check_gate(result: dict, where: str) -> None:
    """Raises `UserError` for a failed gate that stops; says so on standard output for one that warns."""
    if result["verdict"] == "passed":
        return
    baseline = "Hugging Face model" if result["baseline_engine"] == "transformers" else "portable engine in float32"
    message = (
        f"{where}: perplexity {result['value']:.3f} is {result['increase_percent']:.1f}% above the "
        f"{result['baseline']:.3f} of the {baseline}; the recipe allows {result['limit_percent']:g}%"
    )
    if result["gate"] == "fail":
        raise UserError(f"{message}. Choose a finer recipe, or set max_perplexity_increase or 'gate: warn' in it")
    print(f"warning: {message}")
