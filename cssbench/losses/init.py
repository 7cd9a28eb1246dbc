"""MiB's initialisation of new classifiers from the background's (Cermelli et al. 2020)."""

from __future__ import annotations

import math

from torch import Tensor


def balanced_init(weight0: Tensor, bias0: Tensor, num_new: int) -> tuple[Tensor, Tensor, Tensor]:
    """Classifiers of N new classes that share the background's probability evenly with it.

    weight0: row of the background in the classifier, any shape S: (D,), or (D, 1, 1) of a 1x1 convolution.
    bias0: its bias, a scalar. num_new: N >= 1, the new classes of this step.
    Returns new weights (N, *S), new biases (N,) and the background's new bias, detached copies: weight0 in every row;
    bias0 - log(N + 1) for all. Each of the N + 1 then has 1/(N + 1) of the background's former probability, and the
    probability of every other class is what it was.

    The public code takes the logarithm in float32; here it has the precision of `bias0`. RCIL's code copies the
    weight only.
    """
    if num_new < 1:
        raise ValueError(f"num_new is {num_new}; expected at least 1.")
    bias = bias0.detach().reshape(()) - math.log(num_new + 1)
    return weight0.detach().expand(num_new, *weight0.shape).clone(), bias.repeat(num_new), bias
