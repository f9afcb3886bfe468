"""An optimizer for an item table of which each step uses few rows: a step's work scales with those rows, not all."""

from __future__ import annotations

import torch
from torch import Tensor

BETA = 0.999  # decay of the second moment: Adam's beta2
EPSILON = 1e-8


class RowWiseAdam:
    """Adam (Kingma & Ba, 2015) without momentum, and with one second moment per row instead of one per weight.

    For a row with gradient g in step t, with v = 0 before the first:

        v = BETA v + (1 - BETA) mean(g²)        also for an unused row, where g = 0
        w = w - rate g / (sqrt(v / (1 - BETA^t)) + EPSILON)

    A step that does not use a row would only multiply its v by BETA. That is caught up at the row's next use, so the
    result equals a pass over all rows in each step. The row-wise scaling is that of FBGEMM's PARTIAL_ROWWISE_ADAM and
    DLRM's RowWiseSparseAdagrad (Naumov et al., 2019). A row gets at once what momentum would spread over the steps
    after its use: its steps have AdamW's size, so AdamW's learning rate fits.

    Weight decay is AdamW's. It, too, is caught up for the steps since the row's last use, at the current step's rate.

    State: float32 and int32 [rows], 8 bytes per row (AdamW: 8 bytes per weight).
    """

    def __init__(self, weight: Tensor, *, weight_decay: float, seed: int) -> None:
        """Args:
        weight: float32 or bfloat16 [rows, width], whose gradients are sparse. bfloat16 rows are rounded
            stochastically, so that steps below half a unit in the last place count on average (Gupta et al., 2015).
        seed: of the rounding; the same on all processes.
        """
        self.weight = weight
        self._decay, self._seed = weight_decay, seed
        self._square = torch.zeros(len(weight), device=weight.device)  # v, as of the step of `_used`
        self._used = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)  # the row's last step
        self._steps = 0
        self._random = torch.Generator(weight.device)

    def take_gradient(self) -> tuple[Tensor, Tensor]:
        """This process's gradient since the last call: distinct rows, int64 [n], and their gradients, float32
        [n, width]. n is 0 if no backward pass has reached the table.
        """
        gradient, self.weight.grad = self.weight.grad, None
        if gradient is None:
            return torch.empty(0, dtype=torch.int64, device=self.weight.device), self.weight.new_empty(
                (0, self.weight.shape[1]), dtype=torch.float32
            )
        return summed(gradient._indices()[0], gradient._values(), len(self.weight))

    @torch.no_grad()
    def step(self, rows: Tensor, gradient: Tensor, rate: float) -> None:
        """Updates the rows, int64 [n], each once, by their gradients, float32 [n, width]."""
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
            # Seeded by the step: all processes round alike, and a resumed run rounds like an uninterrupted one.
            values = rounded_by_chance(values, self._random.manual_seed(self._seed + self._steps))
        self.weight[rows] = values

    def tensors(self) -> dict[str, Tensor]:
        """The state, by name."""
        return {"square": self._square, "used": self._used, "steps": torch.tensor(self._steps)}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Loads the result of `tensors()`."""
        self._square.copy_(tensors["square"])
        self._used.copy_(tensors["used"])
        self._steps = int(tensors["steps"])


def summed(rows: Tensor, values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The distinct rows, sorted, int64 [m], and the sum of each row's values, float32 [m, width].

    Args:
        rows: int64 [n], numbers below `count`, in any order.
        values: of any float type [n, width].
    """
    gradient = torch.sparse_coo_tensor(rows[None], values.float(), (count, values.shape[1])).coalesce()
    return gradient.indices()[0], gradient.values()


def rounded_by_chance(values: Tensor, random: torch.Generator) -> Tensor:
    """Stochastic rounding, float32 → bfloat16: up or down at random, unbiased.

    A bfloat16 is the upper half of a float32: random bits are added to the lower half, which is then cut off.
    """
    noise = torch.randint(1 << 16, values.shape, generator=random, dtype=torch.int32, device=values.device)
    return ((values.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()
