"""One paper, one file, or one folder of what the paper's parts are called. `AGENTS` is the table that names them."""

from wmjax.agents import dreamer_v1, dreamer_v2, dreamer_v3, iris, world_models

# name -> (configuration, factory)
AGENTS = {
    "dreamer_v1": (dreamer_v1.DreamerV1Config, dreamer_v1.dreamer_v1),
    "dreamer_v2": (dreamer_v2.DreamerV2Config, dreamer_v2.dreamer_v2),
    "dreamer_v3": (dreamer_v3.DreamerV3Config, dreamer_v3.dreamer_v3),
    "world_models": (world_models.WorldModelsConfig, world_models.world_models),
    "iris": (iris.IRISConfig, iris.iris),
}
