"""What the trainer knows of a training method: a stage names its networks and gives their losses."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from longlive.training.draw import Draw

FillSamples = Callable[[dict[str, Tensor]], None]


@dataclass(frozen=True)
class Loss:
    """value: a scalar with gradient; metrics: scalars worth a curve, without; num_frames: latent frames it took."""

    value: Tensor
    metrics: Mapping[str, Tensor]
    num_frames: int


class Stage(ABC):
    """A training method. It may keep state between steps, and owns none of the weights."""

    @abstractmethod
    def due(self, step: int) -> Sequence[str]:
        """The networks that step `step` updates, in the order in which their losses are asked for."""

    @abstractmethod
    def loss(self, network: str, draw: Draw) -> Loss:
        """The loss of one micro-batch for one of its networks, whose gradient is wanted."""

    def updated(self, network: str) -> None:  # noqa: B027  by default nothing depends on the weights
        """The trainer has changed a network's weights."""

    def state(self) -> dict[str, Any]:
        """What must be saved to go on exactly: under "samples" tensors [B, ...] of this process's samples, by name;
        under "values" plain values, the same on every process. By default nothing outlives a step."""
        return {"samples": {}, "values": {}}

    def restore(  # noqa: B027  by default there is nothing to restore
        self, values: Mapping[str, Any], batch_size: int, fill: FillSamples | None
    ) -> None:
        """Go on from a saved state. fill: puts what was saved into tensors [batch_size, ...] by name, in place; None
        where it does not fit, as it was saved for another number of samples: what depended on it begins anew."""
