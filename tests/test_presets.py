import dataclasses

import jax
import pytest

from wmjax import presets
from wmjax.agents import AGENTS
from wmjax.types import Box, Discrete, EnvSpec, UsageError

SPEC = EnvSpec({"image": Box(0, 255, (64, 64, 3), "uint8")}, Discrete(3))


@pytest.mark.parametrize("agent, preset", [(agent, name) for agent in AGENTS for name in presets.PRESETS[agent]])
def test_every_preset_makes_an_agent(agent, preset):
    config, settings = presets.resolve(agent, preset, "catch")
    made = AGENTS[agent][1](SPEC, config)
    assert jax.eval_shape(made.init, jax.random.key(0)).params
    assert settings.steps > made.recipe.num_envs


def test_small_is_one_configuration_and_only_the_run_differs_between_environments():
    for agent in AGENTS:
        catch, pendulum = (presets.resolve(agent, "small", env) for env in ("catch", "pendulum"))
        assert catch[0] == pendulum[0]
        assert catch[1] != pendulum[1]


def test_small_changes_sizes_rates_and_scales_only():
    paper, small = (dataclasses.asdict(presets.resolve("dreamer_v3", name)[0]) for name in ("paper", "small"))
    sizes = {"size", "stem", "bins", "length", "batch_size", "num_envs", "horizon", "imagine_last", "replay_capacity"}
    rates = {"learning_rate", "warmup", "train_ratio", "entropy_scale", "image_scale", "vector_scale", "prefill"}
    assert {name for name in paper if paper[name] != small[name]} <= sizes | rates


def test_paper_is_what_the_authors_published():
    paper, _ = presets.resolve("dreamer_v3", "paper")
    assert (paper.batch_size, paper.length, paper.horizon, paper.learning_rate) == (16, 64, 15, 4e-5)
    assert presets.resolve("dreamer_v3", "paper", overrides={"size": "12m"})[0].dimensions.deter == 2048


def test_paper_has_the_authors_settings_of_each_benchmark():
    for name, ratio, envs, size in (
        ("paper", 32, 16, "200m"),
        ("paper_atari100k", 256, 1, "200m"),
        ("paper_crafter", 512, 1, "200m"),
        ("paper_dmc_proprio", 1024, 16, "1m"),
        ("paper_dmc_vision", 256, 16, "200m"),
    ):
        config, _ = presets.resolve("dreamer_v3", name)
        assert (config.train_ratio, config.num_envs, config.size) == (ratio, envs, size)
    paper = presets.resolve("dreamer_v3", "paper")[0]
    assert (paper.warmup, paper.grad_clip, paper.beta1, paper.beta2, paper.epsilon) == (1000, 0.3, 0.9, 0.999, 1e-20)
    assert (paper.replay_capacity, paper.prefill, paper.actor_unimix, paper.eval_action) == (5e6, 1024, 0.01, "sample")
    steps = lambda env: presets.resolve("dreamer_v3", "paper", env)[1].steps
    assert (steps("atari:Pong"), steps("atari200m:Pong"), steps("dmc:walker_walk")) == (400_000, 200_000_000, 1_000_000)
    settings = presets.resolve("dreamer_v2", "paper_atari", "atari200m:Pong")[1]
    assert (settings.steps, settings.image_size) == (200_000_000, 64)


def test_guide_has_the_numbers_of_the_guide():
    guide, _ = presets.resolve("dreamer_v3", "guide")
    dims = guide.dimensions
    assert (dims.deter, dims.stoch, dims.classes, dims.units) == (200, 32, 32, 512)
    assert guide.encoder_units == (512, 512, 1024)
    assert (guide.batch_size, guide.length, guide.horizon, guide.free_nats) == (50, 50, 15, 1.0)
    assert (guide.norm, guide.activation, guide.learning_rate) == ("layer", "relu", 6e-4)


def fields(config, names):
    return {name: getattr(config, name) for name in names.split()}


def test_the_guides_dreamer_v1_has_its_numbers():
    guide, _ = presets.resolve("dreamer_v1", "guide")
    assert fields(guide, "deter hidden stoch embed units depth") == dict(
        deter=200, hidden=200, stoch=30, embed=1024, units=400, depth=32
    )  # fmt: skip
    assert fields(guide, "actor_layers critic_layers input_layer activation conv_activation encoder_padding") == dict(
        actor_layers=3, critic_layers=3, input_layer=False, activation="relu", conv_activation="relu", encoder_padding=1
    )
    assert (guide.model_lr, guide.actor_lr, guide.critic_lr) == (6e-4, 8e-5, 8e-5)
    assert (guide.batch_size, guide.length, guide.horizon) == (50, 50, 15)
    assert (guide.train_every, guide.train_steps, guide.prefill, guide.pretrain) == (100, 100, 0, 0)
    assert (guide.lambda_, guide.bootstrap, guide.use_continue, guide.grad_clip) == (1.0, False, True, 100)


def test_the_guides_dreamer_v2_has_its_numbers():
    guide, _ = presets.resolve("dreamer_v2", "guide")
    assert fields(guide, "deter hidden stoch classes embed units") == dict(
        deter=200, hidden=200, stoch=32, classes=32, embed=1024, units=400
    )
    assert (guide.model_lr, guide.actor_lr, guide.critic_lr) == (6e-4, 8e-5, 8e-5)
    assert (guide.batch_size, guide.length, guide.horizon) == (50, 50, 15)
    assert (guide.free_nats, guide.kl_balance, guide.kl_mode, guide.free_mode) == (1.0, 0.8, "guide_code", "latent")
    assert (guide.reward_head, guide.critic_head, guide.reward_layers) == ("symlog_mse", "symlog_mse", 2)
    assert (guide.latent_estimator, guide.eval_latent) == ("gumbel_straight_through", "mode")
    assert (guide.cell, guide.input_layer, guide.activation) == ("gru", False, "relu")
    text, _ = presets.resolve("dreamer_v2", "guide", None, {"kl_mode": "balanced", "kl_balance": 0.5})
    assert (text.kl_mode, text.kl_balance) == ("balanced", 0.5)


def test_the_papers_dreamer_v1_differs_between_continuous_and_discrete_actions():
    continuous, discrete = (presets.resolve("dreamer_v1", name)[0] for name in ("paper", "paper_discrete"))
    for config in (continuous, discrete):
        assert config.within_episode and (config.batch_size, config.length, config.free_nats) == (50, 50, 3.0)
        assert (config.model_lr, config.actor_lr, config.critic_lr, config.epsilon) == (6e-4, 8e-5, 8e-5, 1e-7)
    assert fields(continuous, "use_continue kl_scale horizon exploration") == dict(
        use_continue=False, kl_scale=1.0, horizon=15, exploration=0.3
    )
    assert fields(discrete, "use_continue kl_scale horizon exploration exploration_min cont_scale") == dict(
        use_continue=True, kl_scale=0.1, horizon=10, exploration=0.4, exploration_min=0.1, cont_scale=10.0
    )


def test_the_papers_dreamer_v2_has_a_preset_for_each_of_its_published_settings():
    names = "deter discount kl_scale free_nats entropy_scale model_lr actor_lr critic_lr cont_scale train_every"
    expected = {
        "paper": (600, 0.999, 0.1, 0.0, 1e-3, 2e-4, 4e-5, 1e-4, 5.0, 16),
        "paper_atari": (600, 0.995, 0.1, 0.0, 1e-3, 2e-4, 4e-5, 1e-4, 5.0, 4),
        "paper_dmc": (200, 0.99, 1.0, 1.0, 1e-4, 3e-4, 8e-5, 8e-5, 5.0, 5),
        "paper_crafter": (1024, 0.999, 1.0, 0.0, 3e-3, 1e-4, 1e-4, 1e-4, 1.0, 5),
    }
    for preset, values in expected.items():
        config, _ = presets.resolve("dreamer_v2", preset)
        assert tuple(fields(config, names).values()) == values, preset
        assert config.within_episode and config.prioritize_ends and config.kl_balance == 0.8
        assert (config.epsilon, config.grad_clip, config.weight_decay) == (1e-5, 100.0, 1e-6)
        assert config.hidden == config.deter and config.slow_critic_every == 100
    assert presets.resolve("dreamer_v2", "paper_atari")[0].batch_size == 50
    assert presets.resolve("dreamer_v2", "paper_crafter")[0].norm == "layer"
    assert not presets.resolve("dreamer_v2", "paper_dmc")[0].use_continue


def test_the_guides_iris_has_its_numbers():
    guide, _ = presets.resolve("iris", "guide")
    assert fields(guide, "vocab_size embed_dim width heads layers reward_tokens horizon norm ff") == dict(
        vocab_size=512, embed_dim=64, width=512, heads=8, layers=6, reward_tokens=True, horizon=15, norm="pre", ff=None
    )


def test_the_papers_iris_is_its_atari_100k():
    paper, _ = presets.resolve("iris", "paper")
    assert fields(paper, "collect_epochs collect num_envs final_epochs epsilon") == dict(
        collect_epochs=500, collect=200, num_envs=1, final_epochs=100, epsilon=0.01
    )
    assert (paper.tokenizer_batch, paper.world_model_batch, paper.actor_critic_batch) == (256, 64, 64)
    assert (paper.tokenizer_after, paper.world_model_after, paper.actor_critic_after) == (5, 25, 50)
    assert {paper.tokenizer_rate, paper.world_model_rate, paper.actor_critic_rate} == {1e-4}
    assert fields(paper, "discount lambda_ entropy_scale weight_decay grad_clip") == dict(
        discount=0.995, lambda_=0.95, entropy_scale=1e-3, weight_decay=0.01, grad_clip=10.0
    )


# Rows of the comparison of guide and papers that are options of the agents, beyond the presets.
REACHABLE = [
    ("dreamer_v1", dict(encoder_padding="SAME", embed=512)),
    ("dreamer_v1", dict(grad_accum=4, remat=True, compute_dtype="bfloat16")),
    ("dreamer_v1", dict(cell="layer_norm_gru", entropy_scale=1e-3, weight_decay=1e-6)),
    ("dreamer_v2", dict(kl_mode="plain", free_mode="step")),
    ("dreamer_v2", dict(latent="gaussian", reward_head="symlog_mse")),
    ("dreamer_v2", dict(cell="gru", norm="layer", grad_accum=2, remat=True, compute_dtype="bfloat16")),
    ("iris", dict(norm="post", activation="relu", ff=2048, reward_tokens=True, position_std=1.0)),
    ("iris", dict(codebook="ema_cosine", codebook_reset=0.1, recon_loss="delta_iris", compute_dtype="bfloat16")),
]


@pytest.mark.parametrize("agent, overrides", REACHABLE)
def test_the_guides_choices_are_reachable_from_any_preset(agent, overrides):
    config, _ = presets.resolve(agent, "small", None, overrides)
    assert jax.eval_shape(AGENTS[agent][1](SPEC, config).init, jax.random.key(0)).params


def test_every_agent_has_a_default_environment():
    assert set(presets.DEFAULT_ENVS) == set(AGENTS)


def test_settings_of_an_environment_belong_to_small():
    assert presets.resolve("dreamer_v3", "small", "pendulum")[1] == presets.RUNS["dreamer_v3"]["pendulum"]
    assert presets.resolve("dreamer_v3", "paper", "pendulum")[1].image_size is None
    assert presets.resolve("dreamer_v3", "small", "never heard of")[1] == presets.DEFAULT_RUN
    assert presets.resolve("dreamer_v1", "small", "dmc:walker_walk")[1].action_repeat == 2
    assert presets.resolve("world_models", "small", "gym:CarRacing-v3")[1].image_size == 64


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("dreamer_v4",), "agent 'dreamer_v4' 'dreamer_v3'"),
        (("dreamer_v3", "smal"), "preset 'smal' 'small'"),
        (("dreamer_v3", "small", None, {"horizn": 3}), "field 'horizn' 'horizon'"),
        (("dreamer_v3", "small", None, {"horizon": 0}), "horizon 0"),
        (("dreamer_v3", "small", None, {"horizon": "3"}), "horizon '3' integer"),
        (("dreamer_v3", "small", None, {"horizon": True}), "horizon True integer"),
        (("dreamer_v3", "small", None, {"learning_rate": "fast"}), "learning_rate 'fast' number"),
        (("dreamer_v3", "small", None, {"size": "2m"}), "size '2m' 12m"),
        (("dreamer_v3", "small", None, {"encoder_units": [8, "x"]}), "encoder_units [8, 'x'] tuple None"),
        (("dreamer_v3", "small", None, {"batch_size": 10**7}), "batch_size 10000000"),
    ],
)
def test_wrong_names_types_and_ranges_are_named_in_one_line(arguments, words):
    with pytest.raises(UsageError) as caught:
        presets.resolve(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    missing = [word for word in words.split(" ") if word.strip("[],") not in message]
    assert not missing, message


def test_whole_numbers_are_numbers_and_lists_are_tuples():
    config, _ = presets.resolve("dreamer_v3", "small", None, {"learning_rate": 1, "encoder_units": [8, 8]})
    assert type(config.learning_rate) is float
    assert config.encoder_units == (8, 8)
