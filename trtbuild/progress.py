"""Progress bars on standard error."""

from tqdm import tqdm


def byte_bar(total: int, what: str) -> tqdm:
    """A bar over bytes; call `.update(nbytes)`."""
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, unit_divisor=1024, mininterval=0.5)


def item_bar(total: int, what: str, unit: str) -> tqdm:
    """A bar over countable things."""
    return tqdm(total=total, desc=what, unit=unit, mininterval=0.5)
