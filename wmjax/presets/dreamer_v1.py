"""Presets of DreamerV1: what they change of the paper's defaults."""

# An episode is drawn first, then a window within it; and networks compute in 16 bits. The authors' are those of float16
# with a scaled loss, of which bfloat16 has no need.
AUTHORS = dict(within_episode=True, over="episodes", compute_dtype="bfloat16")

# fmt: off
PRESETS = {
    "small": dict(
        # Sizes.
        deter=128, hidden=64, stoch=16, depth=8, units=64,
        vector_layers=2, cont_layers=2, actor_layers=2, critic_layers=2,
        batch_size=16, length=16, horizon=10, imagine_last=8, num_envs=16, replay_capacity=100_000, use_continue=True,
        # Learning rates, train ratio, scales.
        prefill=1024, pretrain=0, train_every=16, train_steps=2, model_lr=1e-3, actor_lr=3e-4, critic_lr=1e-3,
        reward_transform="symlog",  # returns of hundreds are learned slowly by a critic of deviation 1
        discount=0.98, free_nats=1.0, image_scale=4.0, cont_scale=1.0,
        entropy_scale=0.06,  # with less the actor saturates before the critic knows anything
    ),
    # "Paper 2" of the guide: dense ReLU layers, [z, a] straight into the GRU, padded convolutions with a layer of
    # 1024 after them, a continue head, plain discounted sums of imagined rewards, 100 updates per 100 steps.
    "guide": dict(
        embed=1024, encoder_padding=1, input_layer=False, activation="relu", actor_layers=3, use_continue=True,
        lambda_=1.0, bootstrap=False, prefill=0, pretrain=0, train_every=100, train_steps=100,
    ),
    # Replay keeps everything: as many steps as the paper takes.
    "paper": AUTHORS | dict(replay_capacity=2_500_000),
    "paper_discrete": AUTHORS | dict(
        use_continue=True, kl_scale=0.1, horizon=10,
        exploration=0.4, exploration_min=0.1, exploration_updates=200_000, replay_capacity=2_000_000,
    ),
}
