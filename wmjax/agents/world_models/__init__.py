"""World Models: an autoencoder sees (V), a recurrent mixture network predicts (M), and an evolved controller acts (C).

Paper: Ha & Schmidhuber, "World Models" / "Recurrent World Models Facilitate Policy Evolution" (NeurIPS 2018, arXiv
1803.10122). Implemented as the authors' code of 2018 does it (CarRacing: `paper_car`, Doom: `paper_doom`); options give
Tallec's PyTorch version (one mixture for all latent dimensions, means instead of samples) and the implementation guide.

Departures: pictures are the environment's own (no crop of a dashboard, no contrast stretching); the memory sees actions
as the agent chose them, in [-1, 1], not as the environment maps them; transitions from an episode's last record to the
next one's first are not learned from, and the end that M predicts is the environment's own, never a time limit; biases
start at 0; the sign of the weight decay of solutions is mended; the distribution's mean that is kept is chosen from
evaluations of `mean_rollouts` episodes.

Read `config`, `modules` (the networks), `vision` (V), `memory` (M, and the world model), `controller` (C, and the
search for it), `collection` (of the first records) and `agent` (acting, and the stages).
"""

from wmjax.agents.world_models.agent import Equations, init_params, world_models
from wmjax.agents.world_models.config import EvolveConfig, WorldModelsConfig
from wmjax.agents.world_models.memory import memory_loss
from wmjax.agents.world_models.modules import Networks, networks
from wmjax.agents.world_models.vision import kl_floor, reconstruction_loss, vision_loss

__all__ = [
    "Equations", "EvolveConfig", "Networks", "WorldModelsConfig", "init_params", "kl_floor", "memory_loss", "networks",
    "reconstruction_loss", "vision_loss", "world_models",
]  # fmt: skip
