"""The operations, one file each. A decoder reads `from trtbuild.network import ops` and `ops.rms_norm(...)`."""

from trtbuild.network.ops.add import add
from trtbuild.network.ops.attention import attention
from trtbuild.network.ops.cast import cast
from trtbuild.network.ops.collectives import all_gather, all_reduce, receive, send
from trtbuild.network.ops.embedding import embedding, embedding_part
from trtbuild.network.ops.log_n import log_n
from trtbuild.network.ops.prompt_ntk import prompt_ntk
from trtbuild.network.ops.rms_norm import rms_norm
from trtbuild.network.ops.rotary_embedding import rotary_embedding
from trtbuild.network.ops.rotate import rotate
from trtbuild.network.ops.scale_tokens import scale_tokens
from trtbuild.network.ops.select_columns import select_columns
from trtbuild.network.ops.select_rows import select_rows
from trtbuild.network.ops.split_heads import split_heads
from trtbuild.network.ops.swiglu import swiglu

__all__ = [
    "add",
    "all_gather",
    "all_reduce",
    "attention",
    "cast",
    "embedding",
    "embedding_part",
    "log_n",
    "prompt_ntk",
    "receive",
    "rms_norm",
    "rotary_embedding",
    "rotate",
    "scale_tokens",
    "select_columns",
    "select_rows",
    "send",
    "split_heads",
    "swiglu",
]
