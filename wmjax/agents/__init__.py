"""One paper, one file, or one folder of what the paper's parts are called. `AGENTS` is the table that names them.

A factory makes the agent for one environment: `NAME(spec, config, axis_name=None, equations=None) -> Agent`.

Args:
  spec: observations and actions. The Dreamers take uint8 images, float32 vectors and Discrete entries, alone or
    together, and Discrete, MultiDiscrete or float32 Box actions of rank 1.
  config: hyperparameters.
  axis_name: the named axis (of `vmap`, `shard_map` or `pmap`) that batches are spread over, or None; `types.Axes` where
    parameters are spread over devices, too.
  equations: the module's own `Equations`, with functions of the user's in the place of the paper's; None: the paper's.

Raises:
  UsageError: a field of `config` is out of range or contradicts another or the environment, or a space of `spec` is not
    supported.
"""

from wmjax.agents import dreamer_v1, dreamer_v2, dreamer_v3, iris, world_models

# name -> (configuration, factory, equations)
AGENTS = {
    "dreamer_v1": (dreamer_v1.DreamerV1Config, dreamer_v1.dreamer_v1, dreamer_v1.Equations),
    "dreamer_v2": (dreamer_v2.DreamerV2Config, dreamer_v2.dreamer_v2, dreamer_v2.Equations),
    "dreamer_v3": (dreamer_v3.DreamerV3Config, dreamer_v3.dreamer_v3, dreamer_v3.Equations),
    "world_models": (world_models.WorldModelsConfig, world_models.world_models, world_models.Equations),
    "iris": (iris.IRISConfig, iris.iris, iris.Equations),
}
