"""Keys and values of the positions already read, so that generation does not read them again."""

from torch import Tensor


class KeyValueCache:
    """One pair of buffers per block, for `capacity` positions, of which `seen` are filled."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.seen = 0
        self.buffers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new positions' keys and values of a block; return those of every position so far.

        All are [batch, n_head, position, head_width]. Raises ValueError when the capacity is used up.
        """
        end = self.seen + k.shape[2]
        if end > self.capacity:
            raise ValueError(f"{end} positions do not fit in a cache made for {self.capacity}; make a larger one.")
        if layer not in self.buffers:
            batch, n_head, _, head_width = k.shape
            shape = (batch, n_head, self.capacity, head_width)
            self.buffers[layer] = (k.new_empty(shape), v.new_empty(shape))
        for buffer, new in zip(self.buffers[layer], (k, v), strict=True):
            buffer[:, :, self.seen : end] = new
        keys, values = self.buffers[layer]
        return keys[:, :, :end], values[:, :, :end]
