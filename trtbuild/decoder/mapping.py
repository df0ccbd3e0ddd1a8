"""Which part of the model a process holds."""

from dataclasses import dataclass

from trtbuild.errors import UserError


@dataclass(frozen=True)
class Mapping:
    """Tensor and pipeline parallel coordinates of one rank; rank = pp_rank * tp_size + tp_rank."""

    tp_size: int = 1
    pp_size: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        if self.world_size != 1:
            raise UserError(
                f"tp_size {self.tp_size} x pp_size {self.pp_size}: engines for several ranks are not supported yet; "
                "use tp_size 1 and pp_size 1"
            )
        if not 0 <= self.rank < self.world_size:
            raise UserError(f"rank {self.rank} is outside a world of {self.world_size}")

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size
