"""The optimizer of an item table of which a step uses few rows: work and memory go with those rows, not with all."""

from __future__ import annotations

import torch
from torch import Tensor

BETA = 0.999  # of the mean of squares, as Adam's beta2
EPSILON = 1e-8


class RowWiseAdam:
    """Adam (Kingma & Ba, 2015) without momentum and with one mean of squares for a row instead of one for a number.

    For a row with gradient g in step t, with v = 0 before the first:

        v = BETA v + (1 - BETA) mean(g²)        also where the row was not used: g = 0 there
        w = w - rate g / (sqrt(v / (1 - BETA^t)) + EPSILON)

    A row that a step does not use only has its v multiplied by BETA; that is made up for when it is used next, so the
    result is the one that a pass over all rows in each step would have. Rows are scaled alone as in FBGEMM's
    PARTIAL_ROWWISE_ADAM and DLRM's RowWiseSparseAdagrad (Naumov et al., 2019). What momentum would spread over the
    steps after a row's use, the row gets at once: the size of its steps is AdamW's, and so is the learning rate.

    Weight decay is AdamW's, of the steps since the row's last use too, at the rate of the step that uses it.

    State: float32 and int32 [rows], 8 bytes for a row (AdamW: 8 bytes for each number in it).
    """

    def __init__(self, weight: Tensor, *, weight_decay: float, seed: int) -> None:
        """Args:
        weight: float32 or bfloat16 [rows, width], whose gradients are sparse. A bfloat16 row is rounded up or down by
            chance, so that steps smaller than half of its last digit count on average (Gupta et al., 2015).
        seed: of the rounding; the same on all processes.
        """
        self.weight = weight
        self._decay, self._seed = weight_decay, seed
        self._square = torch.zeros(len(weight), device=weight.device)  # v, as of the step of `_used`
        self._used = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)  # the row's last step
        self._steps = 0
        self._random = torch.Generator(weight.device)

    def take_gradient(self) -> tuple[Tensor, Tensor]:
        """This process's gradient since the last call: rows, int64 [n], each once, and theirs, float32 [n, width].

        Nothing, [0], where no backward pass has reached the table.
        """
        gradient, self.weight.grad = self.weight.grad, None
        if gradient is None:
            return torch.empty(0, dtype=torch.int64, device=self.weight.device), self.weight.new_empty(
                (0, self.weight.shape[1]), dtype=torch.float32
            )
        return summed(gradient._indices()[0], gradient._values(), len(self.weight))

    @torch.no_grad()
    def step(self, rows: Tensor, gradient: Tensor, rate: float) -> None:
        """Moves the rows, int64 [n], each once, against their gradient, float32 [n, width]."""
        self._steps += 1
        unused = self._steps - self._used[rows]
        square = self._square[rows] * BETA**unused + (1 - BETA) * gradient.square().mean(dim=1)
        self._square[rows] = square
        self._used[rows] = self._steps
        sizes = (square / (1 - BETA**self._steps)).sqrt_().add_(EPSILON)
        values = self.weight[rows].float()
        if self._decay:
            values *= ((1 - rate * self._decay) ** unused)[:, None]
        values -= gradient * (rate / sizes)[:, None]
        if self.weight.dtype == torch.bfloat16:
            # By the step's number: all processes round alike, and a resumed run as one without a stop.
            values = rounded_by_chance(values, self._random.manual_seed(self._seed + self._steps))
        self.weight[rows] = values

    def tensors(self) -> dict[str, Tensor]:
        """The state, by name."""
        return {"square": self._square, "used": self._used, "steps": torch.tensor(self._steps)}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes over what `tensors()` gave."""
        self._square.copy_(tensors["square"])
        self._used.copy_(tensors["used"])
        self._steps = int(tensors["steps"])


def summed(rows: Tensor, values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The rows, each once and in order, int64 [m], and the sums of the values of each, float32 [m, width].

    Args:
        rows: int64 [n], numbers below `count`, in any order.
        values: of any float type [n, width].
    """
    gradient = torch.sparse_coo_tensor(rows[None], values.float(), (count, values.shape[1])).coalesce()
    return gradient.indices()[0], gradient.values()


def rounded_by_chance(values: Tensor, random: torch.Generator) -> Tensor:
    """float32 → bfloat16: up or down, with the chance that makes the mean right.

    A bfloat16 is the upper half of a float32; random bits are added to the lower half, which is then cut off.
    """
    noise = torch.randint(1 << 16, values.shape, generator=random, dtype=torch.int32, device=values.device)
    return ((values.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()
