"""Presets of World Models: what they change of the paper's defaults."""

# fmt: off
PRESETS = {
    "small": dict(
        # Sizes: the VAE a quarter as wide, half of that of its decoder, and one LSTM of 64; a small hidden layer of C.
        latent=16, depth=8, decoder_depth=16, hidden=64, controller_units=8,
        recon_loss="bce",  # so that small things are drawn
        # The reward and the end, so that dreams can be evolved in; the noise of z helps M, not C.
        reward_head="mse", done_head=True, controller_z="mean",
        # Data, batches and learning rates.
        collection="held", collect_steps=16_384, num_envs=16, replay_capacity=16_384,
        vision_learning_rate=1e-3, vision_batch_size=64, vision_updates=3_000,
        memory_batch_size=64, memory_length=32, memory_within_episode=False, memory_updates=2_000,
        evolve=dict(population=32, rollouts=4, generations=60, mean_every=5, mean_rollouts=32),
    ),
    # The defaults: CarRacing.
    "paper_car": dict(),
    # Doom (Take Cover): evolved in dreams, which start at first frames. 10,000 episodes by random actions are about
    # 3.08 million frames: V's log ends after 308 thousand updates, ten epochs of 100 each, and M's after 400 epochs
    # of 61 chunks of 500 frames.
    "paper_doom": dict(
        latent=64, hidden=512, done_head=True, done_pos_weight=10.0, restart_input=True, dream_reward="survival",
        temperature=1.15, memory_decay=0.99999, memory_batch_size=100, memory_length=499, memory_updates=24_400,
        memory_stateful=True, num_envs=100, inputs="zch", controller_bias=False,
        collection="held", collect_steps=3_080_000, replay_capacity=3_080_000, vision_updates=308_000,
        evolve=dict(where="dream", start_from="first", horizon=2100, generations=200),
    ),
    # "Paper 1" of the guide: 96x96 pictures (its decoder, from a 3x3 map so that it really gives 96), 32 latents, a
    # plain ELBO summed over batches, one mixture of 5 for all latents, Gaussian reward, [z] -> 99 parameters.
    "guide": dict(
        encoder_padding="SAME", kl_tolerance=0.0, reduction="sum", vision_learning_rate=1e-3, vision_batch_size=50,
        mixture="shared", reward_head="gaussian", done_head=True, z_source="mean",
        memory_learning_rate=1e-3, memory_final_learning_rate=1e-3, clip="none", controller_z="mean", inputs="z",
        collect_steps=1_000_000, num_envs=1, memory_batch_size=1, memory_updates=1_000, vision_updates=200_000,
        replay_capacity=1_000_000,
        evolve=dict(sigma_init=0.5, population=17, generations=100, rollouts=3, mean_every=10, mean_rollouts=64),
    ),
}
