"""Which part of the model a process holds."""

from dataclasses import dataclass, replace

from trtbuild.errors import UserError
from trtbuild.models.config import ModelConfig


@dataclass(frozen=True)
class Mapping:
    """Tensor and pipeline parallel coordinates of one rank; rank = pp_rank * tp_size + tp_rank.

    The `tp_size` ranks of a pipeline's stage share each of its layers (arXiv 1909.08053); the `pp_size` stages follow
    one another (arXiv 1811.06965). With `use_parallel_embedding` the ranks of a stage share the vocabulary, too. Raises
    `UserError` for sizes below 1 and a rank that there is not.
    """

    tp_size: int = 1
    pp_size: int = 1
    rank: int = 0
    use_parallel_embedding: bool = True

    def __post_init__(self) -> None:
        if self.tp_size < 1 or self.pp_size < 1:
            raise UserError(f"tp_size {self.tp_size} x pp_size {self.pp_size}: both must be at least 1")
        if not 0 <= self.rank < self.world_size:
            raise UserError(f"rank {self.rank} is outside a world of {self.world_size}")

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size

    @property
    def ranks(self) -> list["Mapping"]:
        """Those of all ranks, in order."""
        return [replace(self, rank=rank) for rank in range(self.world_size)]

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp_size

    @property
    def pp_rank(self) -> int:
        return self.rank // self.tp_size

    @property
    def is_first(self) -> bool:
        """Whether its stage begins with the embedding."""
        return self.pp_rank == 0

    @property
    def is_last(self) -> bool:
        """Whether its stage ends with the logits."""
        return self.pp_rank == self.pp_size - 1

    @property
    def stage(self) -> range:
        """The ranks that share its layers, itself among them."""
        first = self.pp_rank * self.tp_size
        return range(first, first + self.tp_size)

    @property
    def layout(self) -> dict:
        """All but the rank, as `config.json` of an engine has it."""
        sizes = {"tp_size": self.tp_size, "pp_size": self.pp_size}
        return sizes if self.use_parallel_embedding else sizes | {"use_parallel_embedding": False}

    def layers(self, count: int) -> range:
        """Which of a model's `count` layers its stage has; of stages that cannot be alike the later have one more."""
        return range(count * self.pp_rank // self.pp_size, count * (self.pp_rank + 1) // self.pp_size)

    def words(self, vocab_size: int) -> range:
        """Which rows of the embedding and of the output product it has: all where ranks do not have as many each."""
        if vocab_size % self.tp_size or not self.use_parallel_embedding:
            return range(vocab_size)
        share = vocab_size // self.tp_size
        return range(self.tp_rank * share, (self.tp_rank + 1) * share)

    def share(self, config: ModelConfig) -> ModelConfig:
        """The part of a model's heads and of the channels within its MLP that a rank has; sizes must divide.

        KV heads fewer than ranks are had by several. The number of layers and the vocabulary stay the model's.
        """
        return replace(
            config,
            num_attention_heads=config.num_attention_heads // self.tp_size,
            num_key_value_heads=max(1, config.num_key_value_heads // self.tp_size),
            intermediate_size=config.intermediate_size // self.tp_size,
        )
