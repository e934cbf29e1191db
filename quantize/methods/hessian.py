"""The Hessian of a linear layer's squared output error, accumulated from its inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from moec.compiler.common.errors import CheckpointError


class Hessian:
    """Accumulates H = sum over tokens of weight * x x^T for one matrix [N, K], such as that of one expert.

    A change D of the matrix W causes the squared error trace(D H D^T) of the outputs x W^T.

    Attributes:
        name: Name of the matrix, for errors.
        tokens: Number of tokens added so far.
    """

    def __init__(self, dimension: int, name: str) -> None:
        self.name = name
        self.tokens = 0
        self._sum = torch.zeros(dimension, dimension)

    def add(self, inputs: Tensor, weights: Tensor | None = None) -> None:
        """Add the inputs of some tokens.

        Args:
            inputs: [..., K] in any float dtype; the leading dimensions are tokens.
            weights: Weight of each token's squared error, [...]: for an expert, the squared routing weight. None: 1.

        Raises:
            CheckpointError: An input is NaN or infinite; the message names the matrix.
        """
        tokens = inputs.detach().reshape(-1, inputs.shape[-1]).to(torch.float32)
        if not len(tokens):
            return
        scaled = tokens if weights is None else tokens * weights.detach().reshape(-1, 1).to(torch.float32)
        update = tokens.T @ scaled
        if not bool(update.isfinite().all()):
            raise CheckpointError(
                f"{self.name}: its calibration inputs hold NaN or infinity",
                hint="run the calibration in fp32; if that does not help, the checkpoint is damaged",
            )
        self._sum += update
        self.tokens += len(tokens)

    def mean(self) -> Tensor:
        """The mean Hessian per token, fp32 [K, K], symmetric; zeros before the first token."""
        mean = self._sum / max(self.tokens, 1)
        return (mean + mean.T) / 2
