import ast
import dataclasses
import re
from pathlib import Path

import jax
import pytest

from tests.presets.paper_settings import CONFIGS
from wmjax import presets
from wmjax.agents import AGENTS
from wmjax.cli.arguments import changes
from wmjax.loops.host.loop import shapes
from wmjax.loops.memory import tree_bytes
from wmjax.loops.schedule import samplings
from wmjax.presets.budgets import BUDGETS, MEASURED, RunSettings
from wmjax.replay.host import sizes
from wmjax.types import Box, Discrete, EnvSpec, HostEnv, UsageError

PAPERS = Path(__file__).parents[2] / "docs" / "papers"
SPEC = EnvSpec({"image": Box(0, 255, (64, 64, 3), "uint8")}, Discrete(3))


@pytest.mark.parametrize("agent, preset", [(agent, name) for agent in AGENTS for name in presets.PRESETS[agent]])
def test_every_preset_makes_an_agent(agent, preset):
    config, settings = presets.resolve(agent, preset, "catch")
    made = AGENTS[agent][1](SPEC, config)
    assert jax.eval_shape(made.init, jax.random.key(0)).params
    assert settings.steps > made.recipe.num_envs


@pytest.mark.slow
def test_the_documentation_names_the_presets_that_need_more_memory_than_one_accelerator_has():
    large, spec = {}, SPEC._replace(survival=True)
    for agent in AGENTS:
        for preset in presets.PRESETS[agent]:
            made = AGENTS[agent][1](spec, presets.resolve(agent, preset, "catch")[0])
            state, example = shapes(made, HostEnv(spec, None))
            assert tree_bytes(state) < 80e9 / 8, (agent, preset)  # the rest is for what an update needs
            kept = example, made.recipe.num_envs, made.recipe.replay_capacity, samplings(made.recipe)
            replay = sizes(*kept).memory_bytes
            if replay > 80e9:
                large[agent, preset] = replay
    text = (PAPERS / "index.md").read_text(encoding="utf-8").split("## Memory\n")[1].split("\n## ")[0]
    told = re.findall(r"^- `(\w+)`, `(\w+)`: (\d+) GB$", text, re.M)
    assert {(agent, preset): int(number) for agent, preset, number in told} == {
        name: round(number / 1e9) for name, number in large.items()
    }


def test_small_is_one_configuration_and_only_how_long_it_is_trained_differs_between_environments():
    lengths = {"vision_updates", "memory_updates", "evolve"}
    for agent in AGENTS:
        anywhere = presets.resolve(agent, "small")
        for env in {row.env for row in BUDGETS if row.agent == agent and row.preset == "small"}:
            config, settings = presets.resolve(agent, "small", env)
            changed = changes(anywhere[0], config)
            assert set(changed) <= lengths, (agent, env)
            assert set(changed.get("evolve", ())) <= {"generations", "rollouts"}, (agent, env)
            assert settings != anywhere[1], (agent, env)


def test_small_changes_sizes_rates_scales_and_how_it_is_evaluated_only():
    paper, small = (dataclasses.asdict(presets.resolve("dreamer_v3", name)[0]) for name in ("paper", "small"))
    sizes = {"size", "stem", "bins", "length", "batch_size", "num_envs", "horizon", "imagine_last", "replay_capacity"}
    rates = {"learning_rate", "warmup", "train_ratio", "entropy_scale", "image_scale", "vector_scale", "prefill"}
    precision = {"compute_dtype", "latent_dtype"}
    assert {name for name in paper if paper[name] != small[name]} <= sizes | rates | precision | {"eval_action"}


def flat(config):
    """Every field, those of a part as "part.field"."""
    fields = {}
    for name, value in dataclasses.asdict(config).items():
        fields |= {f"{name}.{key}": x for key, x in value.items()} if isinstance(value, dict) else {name: value}
    return fields


def test_every_paper_preset_is_written_out_in_whole():
    papers = [(agent, name) for agent in AGENTS for name in presets.PRESETS[agent] if name.startswith("paper")]
    assert list(CONFIGS) == papers
    whole = {}
    for agent, name in papers:
        whole[agent] = whole.get(agent) or CONFIGS[agent, name]
        found = flat(presets.resolve(agent, name)[0])
        assert found == whole[agent] | CONFIGS[agent, name], (agent, name)


def tables(text):
    """Of a page in docs/papers/: rows by agent and preset, each a field and three texts."""
    found, rows = {}, []
    for line in text.splitlines():
        if heading := re.fullmatch(r"### `(\w+)`, `(\w+)`", line):
            found[heading.groups()] = rows = []
        elif row := re.fullmatch(r"\| `([\w.]+)` \| (.*?) \| `(.*?)` \| ?(.*?) ?\|", line):
            rows.append(row.groups())
        else:
            assert not line.startswith("| `"), line
    return found


def test_the_documented_settings_of_the_papers_are_those_of_the_presets():
    found = {}
    for agent in AGENTS:
        found |= tables((PAPERS / f"{agent}.md").read_text(encoding="utf-8").split("## Settings\n")[1])
    assert list(found) == list(CONFIGS)
    for key, rows in found.items():
        assert {field: ast.literal_eval(here) for field, _, here, _ in rows} == CONFIGS[key], key
        for field, authors, here, why in rows:
            assert (why != "") == (authors not in (here, "–")), (key, field)


def test_a_paper_preset_trains_for_as_long_as_its_benchmark_does():
    steps = {
        ("dreamer_v1", "paper"): 5_000_000, ("dreamer_v1", "paper_discrete"): 2_000_000,
        ("dreamer_v2", "paper"): 200_000_000, ("dreamer_v2", "paper_atari"): 200_000_000,
        ("dreamer_v2", "paper_dmc"): 2_000_000, ("dreamer_v2", "paper_crafter"): 1_000_000,
        ("dreamer_v3", "paper"): 1_000_000, ("dreamer_v3", "paper_atari100k"): 400_000,
        ("dreamer_v3", "paper_crafter"): 1_000_000, ("dreamer_v3", "paper_dmc_proprio"): 500_000,
        ("dreamer_v3", "paper_dmc_vision"): 1_000_000, ("world_models", "paper_car"): 10_000_000,
        ("world_models", "paper_doom"): 3_080_000,
    }  # fmt: skip
    for (agent, preset), wanted in steps.items():
        assert presets.resolve(agent, preset)[1].steps == wanted, (agent, preset)
    steps = lambda env: presets.resolve("dreamer_v3", "paper", env)[1].steps
    assert (steps("atari:Pong"), steps("atari200m:Pong"), steps("dmc:walker_walk")) == (400_000, 200_000_000, 1_000_000)
    assert (steps("dmc_proprio:walker_walk"), steps("crafter")) == (500_000, 1_000_000)
    settings = presets.resolve("dreamer_v2", "paper_atari", "atari200m:Pong")[1]
    assert (settings.steps, settings.image_size) == (200_000_000, 64)
    assert presets.resolve("dreamer_v3", "paper", overrides={"size": "12m"})[0].dimensions.deter == 2048


def test_every_row_of_the_budgets_is_of_a_preset_and_says_something():
    for row in BUDGETS:
        assert row.preset == "*" or row.preset in {name for agent in AGENTS for name in presets.PRESETS[agent]}
        assert row.agent == "*" or row.preset in ("*", *presets.PRESETS[row.agent])
        assert row.score or any(value is not ... for value in row[3:-2]), row
        assert bool(row.score) == bool(row.source), row


def test_the_readme_shows_the_measured_scores_and_their_budgets():
    text = (
        (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").split("## Results\n")[1].split("\n## ")[0]
    )
    shown, env = {}, None
    for line in re.findall(r"^\| (.*) \|$", text, re.M)[2:]:
        place, agent, frames, score, _ = (cell.strip(" `") for cell in line.split("|"))
        env = place.partition("`")[0] or env
        shown[agent, env] = int(frames.replace(",", "")), score
    env, score, frames = re.search(r"World Models on `(\w+)` .*?: (\d+), .*?after ([\d,]+) frames", text, re.S).groups()
    shown["world_models", env] = int(frames.replace(",", "")), score
    measured = {(row.agent, row.env): (row.steps, row.score) for row in BUDGETS if row.source == MEASURED}
    assert shown == measured


def test_dreamer_v3_begins_to_train_with_as_many_windows_as_its_authors():
    for preset in ("paper", "paper_atari100k", "paper_crafter", "paper_dmc_proprio", "paper_dmc_vision"):
        config, _ = presets.resolve("dreamer_v3", preset)
        recipe = AGENTS["dreamer_v3"][1](SPEC, dataclasses.replace(config, size="1m")).recipe
        rows = recipe.stages[0].iterations * recipe.stages[0].collect
        windows = recipe.num_envs * (rows - config.length)  # of 65 steps
        assert windows == 1024, preset


def test_dreamer_v1_and_v2_draw_episodes_as_their_authors_do():
    for agent, preset, ends in (
        ("dreamer_v1", "paper", False), ("dreamer_v2", "paper", True), ("dreamer_v2", "paper_dmc", False)
    ):  # fmt: skip
        recipe = AGENTS[agent][1](SPEC, presets.resolve(agent, preset)[0]).recipe
        sampling = recipe.stages[-1].updates[0].sampling
        assert (sampling.over, sampling.within_episode, sampling.prioritize_ends) == ("episodes", True, ends)


def test_doom_in_the_papers_mapping_of_actions_is_searched_with_a_full_covariance():
    config, settings = presets.resolve("world_models", "paper_doom", "vizdoom:TakeCover")
    assert settings.env_args == {"actions": "axis"}
    for preset, env in (("small", "vizdoom:TakeCover"), ("paper_doom", "vizdoom:Basic"), ("paper_doom", "catch")):
        assert not presets.resolve("world_models", preset, env)[1].env_args
    for action, size, kind in ((Box(-1, 1, (1,)), 1088, "cma_es"), (Discrete(3), 3264, "sep_cma_es")):
        agent = AGENTS["world_models"][1](SPEC._replace(action=action), config)
        search = agent.recipe.stages[-1].evolve
        assert (search.strategy.config.dims, search.strategy.config.kind, search.population) == (size, kind, 64)
        assert (search.sampling.starts, search.max_steps) == ("first", 2100)
        made = {stage.name: stage for stage in agent.recipe.stages}
        updates = {name: made[name].iterations * made[name].updates[0].repeats for name in ("vision", "memory")}
        assert updates == {"vision": 308_000, "memory": 24_400}
        # Of a chunk of 500 records 499 are predicted; 61 fit in what each of 100 environments collects.
        assert made["collect"].iterations * made["collect"].collect == 30_800


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


def test_the_guides_iris_has_its_numbers():
    guide, _ = presets.resolve("iris", "guide")
    assert fields(guide, "vocab_size embed_dim width heads layers reward_tokens horizon norm ff") == dict(
        vocab_size=512, embed_dim=64, width=512, heads=8, layers=6, reward_tokens=True, horizon=15, norm="pre", ff=None
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
    assert presets.resolve("dreamer_v3", "small", "pendulum")[1] == RunSettings(200_000, image_size=32, action_repeat=2)
    assert presets.resolve("dreamer_v3", "paper", "pendulum")[1].image_size is None
    assert presets.resolve("dreamer_v3", "small", "never heard of")[1] == RunSettings(100_000)
    assert presets.resolve("dreamer_v1", "small", "dmc:walker_walk")[1].action_repeat == 2
    assert presets.resolve("world_models", "small", "gym:CarRacing-v3")[1].image_size == 64
    searched = lambda env: presets.resolve("world_models", "small", env)[0].evolve
    assert (searched("catch").generations, searched("catch").rollouts) == (100, 16)
    assert (searched("racing").generations, searched("racing").rollouts) == (60, 4)
    assert searched("catch").population == searched("racing").population


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
        (("dreamer_v3", "small", None, {"length": 1, "imagine_last": 0}), "length 2 or more 1"),
        (("dreamer_v3", "small", None, {"imagine_last": 1}), "imagine_last 2 or more 1"),
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


def test_a_run_of_a_version_with_other_fields_is_refused_by_the_name_of_its_file():
    described = {"agent": "iris", "config": dataclasses.asdict(presets.resolve("iris")[0])}
    assert presets.saved_config(described) == presets.resolve("iris")[0]
    described["config"]["encoder_norm"] = True
    with pytest.raises(UsageError, match=r"^config\.json: its 'encoder_norm' is no field of iris in this version"):
        presets.saved_config(described)
