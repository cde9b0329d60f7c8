"""Loads the official IRIS weights, named and laid out as in PyTorch, into our parameter trees."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from wmjax.authors.iris import our_name, our_value
from wmjax.weights import nested


def tree(rules: list, weights: dict[str, np.ndarray], grid: int | None = None) -> dict:
    """Official flat weights, or gradients, as our nested parameters."""
    names = {official: our_name(rules, official) for official in weights}
    return nested({name: jnp.asarray(our_value(name, weights[official], grid)) for official, name in names.items()})
