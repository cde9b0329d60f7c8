"""IRIS: images as tokens, a transformer that predicts them one by one, and an actor-critic that learns in its dreams.

Paper: Micheli, Alonso, Fleuret, "Transformers are Sample-Efficient World Models" (arXiv 2209.00588, ICLR 2023).
Implemented from the paper and from recorded numbers of the authors' run, without their code.

Departures: `is_terminal` is the environment's own, never a time limit. The last observation of an episode, which
`wmjax` keeps, is one more frame to predict. While acting, the LSTM's state is carried on across updates instead of
being computed anew from the last 20 frames. Each environment draws its own random actions (`epsilon`). LPIPS needs
weights that cannot be shipped, so `perceptual` is "random_features" unless they are given: results without LPIPS are
not the paper's. Off by default and not in the paper: patches, reward tokens, codebooks that learn by moving averages,
reset of dead entries, other perceptual losses.

Read `config`, `modules` (the networks), `tokenizer`, `dynamics` (the world model), `behavior` (the actor-critic) and
`agent` (acting, and the schedule).
"""

from wmjax.agents.iris.agent import Equations, iris, recipe
from wmjax.agents.iris.behavior import actor_critic_losses, lambda_returns
from wmjax.agents.iris.config import IRISConfig
from wmjax.agents.iris.dynamics import generate, start_state, world_model, world_model_losses
from wmjax.agents.iris.modules import Networks, init_params, networks
from wmjax.agents.iris.tokenizer import decode, encode, reconstruction_loss, tokenizer_losses

__all__ = [
    "Equations", "IRISConfig", "Networks", "actor_critic_losses", "decode", "encode", "generate", "init_params", "iris",
    "lambda_returns", "networks", "recipe", "reconstruction_loss", "start_state", "tokenizer_losses", "world_model",
    "world_model_losses",
]  # fmt: skip
