"""Presets of DreamerV2: what they change of the paper's defaults."""

from wmjax.presets.dreamer_v1 import AUTHORS

# fmt: off
PRESETS = {
    "small": dict(
        # Sizes.
        deter=128, hidden=64, stoch=8, classes=8, depth=8, units=64,
        vector_layers=2, reward_layers=2, cont_layers=2, actor_layers=2, critic_layers=2,
        norm="layer",  # as for Crafter; without it the latents saturate at these learning rates
        length=16, horizon=10, imagine_last=8, num_envs=16, replay_capacity=100_000,
        # Learning rates, train ratio, scales.
        prefill=1024, pretrain=0, model_lr=4e-4, actor_lr=3e-4, critic_lr=5e-4, reward_transform="symlog",
        discount=0.99, free_nats=1.0, image_scale=4.0, cont_scale=1.0, entropy_scale=1e-2,
    ),
    # "Paper 3" of the guide: 32 x 32 latents, the rest as its "Paper 2"; Gumbel-softmax, symlog rewards and values,
    # the KL as its code computes it (its text: kl_mode="balanced", kl_balance=0.5).
    "guide": dict(
        deter=200, hidden=200, depth=32, embed=1024, encoder_padding=1, cell="gru", input_layer=False,
        activation="relu", reward_layers=2, actor_layers=3, critic_layers=3,
        reward_head="symlog_mse", critic_head="symlog_mse", reward_transform="identity",
        latent_estimator="gumbel_straight_through", eval_latent="mode",
        kl_mode="guide_code", kl_balance=0.8, kl_scale=1.0, free_nats=1.0, free_mode="latent",
        cont_scale=1.0, discount=0.99, model_lr=6e-4, actor_lr=8e-5, critic_lr=8e-5,
        batch_size=50, length=50, replay_capacity=1_000_000,
        prefill=0, pretrain=0, train_every=100, train_steps=100,
    ),
    # On Atari and Crafter the last window of an episode is drawn more often.
    "paper": AUTHORS | dict(prioritize_ends=True),
    "paper_atari": AUTHORS | dict(prioritize_ends=True, batch_size=50, discount=0.995, train_every=4),
    "paper_dmc": AUTHORS | dict(
        deter=200, hidden=200, free_nats=1.0, kl_scale=1.0, use_continue=False, reward_transform="identity",
        discount=0.99, entropy_scale=1e-4, cont_scale=1.0, model_lr=3e-4, actor_lr=8e-5, critic_lr=8e-5,
        prefill=1000, pretrain=100, train_every=5,
    ),
    "paper_crafter": AUTHORS | dict(
        prioritize_ends=True, deter=1024, hidden=1024, norm="layer", kl_scale=1.0, cont_scale=1.0, entropy_scale=3e-3,
        model_lr=1e-4, actor_lr=1e-4, critic_lr=1e-4, prefill=10_000, train_every=5,
    ),
}
