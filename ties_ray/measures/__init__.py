"""Measures of models: how two tensors differ, how many task vectors relate, what a merge does to elements.

This room is pure: tensors and numbers in, numbers out. It knows no store, no format and no command line.
"""

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
"""A vector or a matrix of fp64."""
