"""How task vectors relate in pairs: products, norms, cosines and signs; and the spectra of low-rank changes.

Products of two low-rank changes come from their factors: <B1 A1, B2 A2> is the sum over (B1^T B2) * (A1 A2^T). So no
dense change is formed, and the figures are those of fp64.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ties_ray.kernels import Factors
from ties_ray.measures import Matrix
from ties_ray.measures.positions import some_rows

TILE = 1024
"""Summed ranks of the models whose products are formed at a time: a tile of fp64 takes 8 MiB."""
ROOM = 2**22
"""Elements of all models that are converted to fp64 at a time: 32 MiB."""
SIGNS = 4096
"""Elements of a low-rank change whose signs are looked at, whole rows, one at least."""


class Pairs:
    """The sums of N task vectors, as far as they have been added."""

    def __init__(self, num_models: int) -> None:
        self.products: Matrix = np.zeros((num_models, num_models))
        """<task vector i, task vector j>."""
        self.overlaps: Matrix = np.zeros((num_models, num_models))
        """Elements that both i and j change, of those whose signs were looked at."""
        self.conflicts: Matrix = np.zeros((num_models, num_models))
        """Elements of these that i and j change in different directions."""
        self.against: Matrix = np.zeros(num_models)
        """Elements that model i changes against the sign of the sum of all models."""
        self.looked_at = 0
        """Elements whose signs were looked at."""
        self.spectrum: Matrix = np.zeros((num_models, 0))
        """Squared singular values of low-rank changes in falling order, added up over the parameters."""

    @property
    def norms(self) -> Matrix:
        """Return the norm of each task vector."""
        return np.sqrt(np.maximum(0.0, self.products.diagonal()))

    @property
    def cosines(self) -> Matrix:
        """Return the cosine of each pair; 0 where a task vector is zero, and 1 of each with itself."""
        scale = np.outer(self.norms, self.norms)
        cosines = np.divide(self.products, scale, out=np.zeros_like(scale), where=scale > 0)
        np.fill_diagonal(cosines, 1.0)
        return np.clip(cosines, -1.0, 1.0)

    @property
    def conflict_shares(self) -> Matrix:
        """Return the share of the common elements of each pair that have different signs."""
        return np.divide(self.conflicts, self.overlaps, out=np.zeros_like(self.overlaps), where=self.overlaps > 0)

    @property
    def against_shares(self) -> Matrix:
        """Return the share of each model's changed elements that go against the sign of the sum of all."""
        changed = self.overlaps.diagonal()
        return np.divide(self.against, changed, out=np.zeros_like(self.against), where=changed > 0)

    def add_dense(self, deltas: Tensor) -> None:
        """Add a block of all task vectors: fp32, (models, elements)."""
        for part in torch.split(deltas, max(1, ROOM // max(1, len(deltas))), dim=1):
            wide = part.double()
            self.products += (wide @ wide.T).numpy()
            self._add_signs(part)

    def add_products(self, factors: Sequence[Factors | None]) -> None:
        """Add a whole parameter of all task vectors, as plain factors; None of a model that does not change it."""
        own = [(number, each) for number, each in enumerate(factors) if each is not None]
        groups = list(_groups(own))
        for first, group in enumerate(groups):
            for other in groups[first:]:
                block = _products([each for _, each in group], [each for _, each in other])
                rows, columns = [number for number, _ in group], [number for number, _ in other]
                self.products[np.ix_(rows, columns)] += block
                if other is not group:
                    self.products[np.ix_(columns, rows)] += block.T
        for number, each in own:
            self._add_spectrum(number, each)
        if own:
            shape = own[0][1].left.shape[0], own[0][1].right.shape[1]
            rows = some_rows(*shape, SIGNS)
            sample = torch.zeros(len(factors), len(rows) * shape[1])
            for number, each in own:
                sample[number] = (each.left[rows] @ each.right).mul_(each.scale).view(-1)
            self._add_signs(sample)

    def _add_signs(self, deltas: Tensor) -> None:
        """Add the signs of a block: fp32, (models, elements), fewer elements than fp32 counts exactly."""
        signs = deltas.sign()
        of_sum = deltas.sum(0).sign()
        changed = signs.abs()
        overlaps = (changed @ changed.T).double().numpy()
        self.overlaps += overlaps
        self.conflicts += (overlaps - (signs @ signs.T).double().numpy()) / 2
        self.against += (signs * of_sum < 0).sum(1).double().numpy()
        self.looked_at += deltas.shape[1]

    def _add_spectrum(self, number: int, factors: Factors) -> None:
        values = squared_singular_values(factors)
        missing = len(values) - self.spectrum.shape[1]
        if missing > 0:
            self.spectrum = np.pad(self.spectrum, ((0, 0), (0, missing)))
        self.spectrum[number, : len(values)] += values


def squared_singular_values(factors: Factors) -> Matrix:
    """Return the squared singular values of a low-rank change, falling, from r x r products in fp64."""
    left, right = factors.left.double(), factors.right.double()
    values, vectors = torch.linalg.eigh(left.T @ left)
    root = vectors * values.clamp(min=0).sqrt()
    squares = torch.linalg.eigvalsh(root.T @ (right @ right.T) @ root).flip(0).clamp(min=0)
    return np.asarray(factors.scale**2 * squares.numpy())


def _groups(own: Sequence[tuple[int, Factors]]) -> Iterator[list[tuple[int, Factors]]]:
    """Yield the models in groups of a summed rank of about `TILE`."""
    group: list[tuple[int, Factors]] = []
    ranks = 0
    for number, each in own:
        if group and ranks + len(each.right) > TILE:
            yield group
            group, ranks = [], 0
        group.append((number, each))
        ranks += len(each.right)
    if group:
        yield group


def _products(first: Sequence[Factors], second: Sequence[Factors]) -> Matrix:
    """Return the products of each change of one group with each of another."""
    left = torch.cat([each.left.double() * each.scale for each in first], dim=1)
    other = torch.cat([each.left.double() * each.scale for each in second], dim=1)
    tile = left.T @ other
    del left, other
    right = torch.cat([each.right for each in first]).double()
    tile *= right @ torch.cat([each.right for each in second]).double().T
    ends = [np.cumsum([0, *(len(each.right) for each in group)])[:-1] for group in (first, second)]
    sums: Matrix = np.add.reduceat(np.add.reduceat(tile.numpy(), ends[0], axis=0), ends[1], axis=1)
    return sums
