"""Loads the official DreamerV3's flat weights into our parameter tree."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from wmjax.authors import dreamer_v3
from wmjax.weights import nested

MODULES = dreamer_v3.MODULES | {"dync": "rssm"}


def our_name(official: str) -> str:
    """`dyn/dynin0/kernel` -> `rssm/dynin_0/kernel`."""
    return dreamer_v3.our_name(official, MODULES)


def tree(weights: dict[str, np.ndarray]) -> dict:
    """Official flat weights as our nested parameters; statistics such as `retnorm` are left out."""
    mine = {name: value for name, value in weights.items() if name.split("/")[0] in MODULES}
    return nested({our_name(name): jnp.asarray(value) for name, value in mine.items()})
