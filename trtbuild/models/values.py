"""The values of a published `config.json`: of the kinds that they are meant to be, and within reason.

Configurations written by hand or by YAML have numbers as text (`1e6` is text in YAML 1.1), integers with a point, and
null for what is not given. What can mean one thing only is taken as that; the rest is a `UserError`.
"""

import math
from collections.abc import Callable
from pathlib import Path

from trtbuild.errors import UserError
from trtbuild.limits import MODEL_LAYERS, MODEL_SIZE


def _number(value: object) -> int | float | None:
    """A finite number; text is read as one."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, int | float) and type(value) is not bool and -math.inf < value < math.inf:
        return value
    return None


def _integer(value: object) -> int | None:
    number = _number(value)
    return None if number is None or number != int(number) else int(number)


def _between(number: int | float | None, low: float, high: float) -> int | float | None:
    """The number, if it is above `low` and at most `high`."""
    return number if number is not None and low < number <= high else None


# A kind: the value that another one means, None if it means none of this kind, and what to say then.
Kind = tuple[Callable[[object], object], str]
SIZE: Kind = (lambda x: _between(_integer(x), 0, MODEL_SIZE), f"an integer from 1 to {MODEL_SIZE} is expected")
LAYERS: Kind = (lambda x: _between(_integer(x), 0, MODEL_LAYERS), f"an integer from 1 to {MODEL_LAYERS} is expected")
NUMBER: Kind = (lambda x: _between(_number(x), 0, math.inf), "a number above 0 is expected")
EPSILON: Kind = (lambda x: _between(_number(x), 0, 0.1), "a number above 0 and at most 0.1 is expected, such as 1.0e-6")
BOOLEAN: Kind = (lambda x: x if type(x) is bool else None, "true or false is expected")
WORD: Kind = (lambda x: x if type(x) is str else None, "a word is expected")

KINDS = {"num_hidden_layers": LAYERS, "rms_norm_eps": EPSILON, "layer_norm_epsilon": EPSILON}
for kind, keys in (
    (
        SIZE,
        "vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim kv_channels "
        "max_position_embeddings original_max_position_embeddings model_max_length seq_length ntk_length logn_length",
    ),
    (NUMBER, "rope_theta rotary_emb_base rotary_pct factor low_freq_factor high_freq_factor initializer_range"),
    (
        BOOLEAN,
        "tie_word_embeddings attention_bias attention_out_bias mlp_bias no_bias use_dynamic_ntk use_logn_attn "
        "scale_attn_weights",
    ),
    (WORD, "rope_type type"),
):
    KINDS |= dict.fromkeys(keys.split(), kind)
MAPPINGS = ("rope_scaling", "rope_parameters", "trtbuild")


def coerced(config: dict, where: Path | str) -> dict:
    """`config` with the values of all known keys in their kinds; null is left out, other keys stay as they are.

    Raises `UserError` for a value of another kind, and for one that no model has: a size below 1 or above `MODEL_SIZE`,
    more than `MODEL_LAYERS` layers, a number that is not finite or not above 0.
    """
    result: dict[str, object] = {}
    for key, value in config.items():
        if key in MAPPINGS and value is not None:
            if not isinstance(value, dict):
                raise UserError(f"{where}: {key} has the wrong type or value: {value!r:.60}; an object is expected")
            result[key] = coerced(value, where)
        elif key not in KINDS:
            result[key] = value
        elif value is not None:
            meaning, expected = KINDS[key]
            result[key] = meaning(value)
            if result[key] is None:
                raise UserError(f"{where}: {key} has the wrong type or value: {value!r:.60}; {expected}")
    return result
