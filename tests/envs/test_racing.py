import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.envs.rollouts import mean_return
from wmjax.envs import make_env, racing, wrappers
from wmjax.types import Box

START = jax.jit(racing._reset)
STEP = jax.jit(lambda state, action: racing._step(None, state, jnp.asarray(action, jnp.float32)))


def lap(**changes):
    """A car at the start of a track without bends, a circle, with some of its state replaced."""
    state = START(jax.random.key(0))._replace(bends=jnp.zeros((4, 2)))
    state = state._replace(position=jnp.array([racing.RADIUS, 0.0]), heading=jnp.float32(np.pi / 2))
    return state._replace(**{name: jnp.asarray(value, jnp.float32) for name, value in changes.items()})


def drive(state, action, steps):
    rewards = []
    for _ in range(steps):
        state, outcome = STEP(state, action)
        rewards.append(float(outcome.reward))
    return state, np.array(rewards), outcome


def scripted_driver(state):
    """Steers at a point of the middle line ahead and slows down for the tightest curve in sight."""
    angle = jnp.arctan2(state.position[1], state.position[0])
    r, slope = racing._curve(state.bends, jnp.cos(angle), jnp.sin(angle))
    turn = 1 / jnp.hypot(r, slope)  # angle around the origin per meter of road
    look = angle + turn * jnp.clip(10 + 0.25 * state.velocity[0], 10, 40)
    target = racing._curve(state.bends, jnp.cos(look), jnp.sin(look))[0] * racing._direction(look) - state.position
    error = jnp.arctan2(target[1], target[0]) - state.heading
    error = jnp.mod(error + jnp.pi, 2 * jnp.pi) - jnp.pi
    ahead = angle + turn * jnp.linspace(0.0, 45.0, 10)
    r, slope = racing._curve(state.bends, jnp.cos(ahead), jnp.sin(ahead))
    curvature = jnp.max(jnp.abs(jnp.diff(ahead + jnp.arctan2(r, slope)))) / 5.0
    speed = jnp.clip(jnp.sqrt(45.0 / jnp.maximum(curvature, 1e-3)), 15, 80)
    change = 0.1 * (speed - state.velocity[0])
    return jnp.stack([jnp.clip(-5 * error, -1, 1), jnp.clip(change, 0, 1), jnp.clip(-change, 0, 1)])


def test_interface_is_carracings():
    spec = make_env("racing").spec
    assert spec.obs == {"image": Box(0, 255, (96, 96, 3), "uint8")}
    assert spec.action == Box((-1.0, 0.0, 0.0), (1.0, 1.0, 1.0), (3,))
    assert (spec.max_episode_steps, spec.action_repeat) == (1000, 1)


@pytest.mark.parametrize("size", [64, 80, 96])
def test_pictures_show_a_red_car_on_a_gray_road_through_green(size):
    env = make_env("racing", image_size=size)
    _, step = jax.jit(env.reset)(jax.random.key(0))
    image = np.asarray(step.obs["image"]).astype(int)
    assert image.shape == (size, size, 3) and step.obs["image"].dtype == jnp.uint8
    assert tuple(image[3 * size // 4, size // 2]) == racing.HULL
    assert tuple(image[size // 2, size // 2]) == racing.ROAD
    share = (image == racing.ROAD).all(-1).mean()
    assert share == pytest.approx(2 * racing.HALF_WIDTH / racing.VIEW, rel=0.15)  # a straight road, less the car
    corner = image[size // 2, 0]
    assert tuple(corner) in (racing.GRASS, racing.GRASS_LIGHT)


def test_the_picture_turns_with_the_car_and_shows_its_front_wheels_turn():
    picture = racing._Picture(64)
    look = lambda **changes: np.asarray(picture.draw(lap(**changes))).astype(int)
    road = lambda image, row: np.flatnonzero((image[row] == racing.ROAD).all(-1)).mean() - 31.5
    straight = look()
    assert road(straight, 5) < -3  # counterclockwise laps curve to the left
    assert road(look(heading=np.pi / 2 + 0.2), 5) > 3  # a car that points to the left sees the road to its right
    left, right = look(steering=0.4), look(steering=-0.4)
    np.testing.assert_array_equal(left, right[:, ::-1] * 0 + left)
    assert np.abs(left - straight).max() > 15 and np.abs(left - right).max() > 15
    assert (left[30:, :20] == straight[30:, :20]).all()  # nothing but the car has changed


def test_a_new_tile_pays_a_share_of_1000_and_every_frame_costs_a_tenth():
    state, rewards, _ = drive(lap(velocity=[50.0, 0.0]), [0.0, 0.0, 0.0], 20)
    tiles = int(state.visited.sum())
    length = np.linalg.norm(state.position - lap().position) + 2 * racing.AXLE
    assert tiles == pytest.approx(length / (2 * np.pi * racing.RADIUS / racing.TILES), abs=1.5)
    np.testing.assert_allclose(rewards.sum(), 1000 / racing.TILES * tiles - 0.1 * 20, rtol=1e-5)
    _, again, _ = drive(lap()._replace(visited=state.visited), [0.0, 0.0, 0.0], 5)
    np.testing.assert_allclose(again, -0.1, atol=1e-6)  # a tile pays once
    _, grass, _ = drive(lap(position=[racing.RADIUS + 10, 0.0]), [0.0, 0.0, 0.0], 5)
    np.testing.assert_allclose(grass, -0.1, atol=1e-6)  # and only on the road


def test_no_tile_is_skipped_at_top_speed_in_either_direction():
    top = racing.ENGINE / racing.DRAG
    for speed in (top, -top):
        state = lap(velocity=[speed, 0.0])
        for _ in range(3):
            state, _ = STEP(state, [0.0, 1.0, 0.0])
        visited = np.asarray(state.visited)
        assert np.abs(np.diff(visited.astype(int), append=visited[0])).sum() == 2  # one run of tiles around the start


def test_a_lap_ends_the_episode_and_so_does_leaving_the_field():
    almost = lap()._replace(visited=jnp.arange(racing.TILES) > 0)
    _, outcome = STEP(almost, [0.0, 0.0, 0.0])
    assert outcome.is_last and outcome.is_terminal and outcome.reward == pytest.approx(1000 / racing.TILES - 0.1)
    outside = lap(position=[racing.FIELD - 0.1, 0.0], heading=0.0, velocity=[50.0, 0.0])
    _, outcome = STEP(outside, [0.0, 0.0, 0.0])
    assert outcome.is_last and outcome.is_terminal and outcome.reward == -100


def test_an_episode_is_cut_after_1000_frames_whatever_the_action_repeat():
    spec = make_env("racing", image_size=8, action_repeat=4).spec
    assert (spec.max_episode_steps, spec.action_repeat) == (250, 4)


def test_the_car_speeds_up_brakes_and_turns_as_it_is_told():
    fast, _, _ = drive(lap(), [0.0, 1.0, 0.0], 100)
    assert 35 < fast.velocity[0] < racing.ENGINE / racing.DRAG
    slow, _, _ = drive(fast, [0.0, 0.0, 1.0], 60)
    assert abs(slow.velocity[0]) < 1
    for steer, side in ((-1.0, 1), (1.0, -1)):
        turned, _, _ = drive(lap(velocity=[15.0, 0.0]), [steer, 0.0, 0.0], 20)
        assert side * (turned.heading - np.pi / 2) > 0.3


def test_the_car_skids_in_a_fast_curve_and_grips_in_a_slow_one():
    def corner(speed, gas=0.0, **changes):
        """Largest sideways speed of the rear axle, as a share of the speed, and how far the path turned."""
        state, most = lap(velocity=[speed, 0.0], **changes), 0.0
        for _ in range(30):
            state, _ = STEP(state, [-0.5, gas, 0.0])
            side = float(state.velocity[1] - racing.AXLE * state.yaw_rate)
            most = max(most, abs(side) / float(jnp.linalg.norm(state.velocity)))
        slip = float(jnp.arctan2(state.velocity[1], state.velocity[0]))
        return most, float(state.heading - lap().heading + slip)

    assert corner(10.0)[0] < 0.03
    assert corner(60.0)[0] > 0.2
    assert corner(40.0, gas=1.0)[0] > 3 * corner(40.0)[0]  # the engine takes grip away from the rear axle
    grass = corner(40.0, position=[racing.RADIUS + 30, 0.0])
    assert 0.3 < grass[1] < 0.8 * corner(40.0)[1]  # half as much grip on grass


def test_each_episode_has_a_closed_track_of_its_own_inside_the_field():
    bends = jax.jit(jax.vmap(racing._reset))(jax.random.split(jax.random.key(0), 500)).bends
    angle = jnp.linspace(0, 2 * np.pi, 721)
    r, slope = jax.vmap(lambda b: racing._curve(b, jnp.cos(angle), jnp.sin(angle)))(bends)
    np.testing.assert_allclose(r[:, 0], r[:, -1], rtol=1e-4)
    np.testing.assert_allclose(slope[:, 1:-1], (r[:, 2:] - r[:, :-2]) / (angle[2] - angle[0]), atol=1.0)
    assert r.max() + racing.HALF_WIDTH < racing.FIELD and r.min() > racing.VIEW
    assert len(np.unique(np.asarray(bends[:, 0, 0]))) > 490
    length = np.hypot(r, slope)[:, :-1].mean(1) * 2 * np.pi
    assert 900 < length.min() and length.max() < 1200
    # The distance that colors and grip are computed from is the true one, as far as the road is wide.
    line = np.stack([r * jnp.cos(angle), r * jnp.sin(angle)], -1)[0]
    points = line[::60] + np.random.default_rng(0).uniform(-6, 6, line[::60].shape).astype(np.float32)
    true = np.linalg.norm(points[:, None] - line, axis=-1).min(1)
    np.testing.assert_allclose(np.abs(racing._distance(bends[0], *points.T)), true, atol=0.8)


def test_what_agents_emit_becomes_steer_gas_and_brake():
    """Rescaled linearly, an idle agent would brake by half."""
    env = wrappers.agent_actions(make_env("racing", image_size=8))
    echo = wrappers.agent_actions(env._replace(step=lambda key, state, action: action))
    for action, native in (((0, 0, 0), (0, 0.5, 0)), ((-1, -1, -1), (-1, 0, 0)), ((2, 1, 0.3), (1, 1, 0.3))):
        np.testing.assert_allclose(echo.step(None, None, jnp.array(action, jnp.float32)), native, atol=1e-6)


def test_a_step_is_a_function_of_state_and_action_whatever_the_key_and_the_batch():
    raw = racing.racing(16)
    state = raw.reset(jax.random.key(1))
    state = state._replace(inner=state.inner._replace(velocity=jnp.array([30.0, 2.0]), yaw_rate=jnp.float32(0.5)))
    action = jnp.array([0.3, 0.6, 0.1])
    advance = lambda key: (lambda s: (s.inner[:-1], raw.observe(s)))(raw.step(key, state, action)[0])
    one = jax.jit(advance)
    batched = jax.jit(jax.vmap(advance))(jax.random.split(jax.random.key(2), 3))
    for a, b, c in zip(*map(jax.tree.leaves, (one(jax.random.key(0)), one(jax.random.key(1)), batched)), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(np.float32(c[1]), np.float32(b), atol=1.01 if a.dtype == jnp.uint8 else 1e-5)


def test_a_scripted_driver_reaches_850_and_random_play_stays_below_50():
    @jax.jit
    @jax.vmap
    def play(key):
        def frame(_, loop):
            state, over, total = loop
            after, outcome = racing._step(None, state, scripted_driver(state))
            total += jnp.where(over, 0, outcome.reward)
            return jax.tree.map(partial(jnp.where, over), state, after), over | outcome.is_last, total

        return jax.lax.fori_loop(0, 1000, frame, (racing._reset(key), jnp.bool_(False), 0.0))[2]

    scores = play(jax.random.split(jax.random.key(0), 32))
    assert scores.mean() >= 850
    env = wrappers.agent_actions(make_env("racing", image_size=8))
    play = lambda key, step: jax.random.uniform(key, (3,), minval=-1)
    assert -100 < mean_return(env, jax.random.key(1), play, 32) < 50


@pytest.mark.slow
def test_a_reset_costs_less_than_a_step():
    """Under `vmap` every step resets, too."""
    env = make_env("racing", image_size=64)
    raw = racing.racing(64)
    keys = jax.random.split(jax.random.key(0), 64)
    state, _ = jax.jit(jax.vmap(env.reset))(keys)

    def seconds(run, *args):
        run = jax.jit(jax.vmap(run))
        jax.block_until_ready(run(*args))
        times = []
        for _ in range(7):
            start = time.perf_counter()
            jax.block_until_ready(run(*args))
            times.append(time.perf_counter() - start)
        return min(times)

    step = seconds(env.step, keys, state, jnp.zeros((64, 3)))
    assert seconds(raw.reset, keys) < step / 2
