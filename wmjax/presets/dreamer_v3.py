"""Presets of DreamerV3: what they change of the paper's defaults."""

# As the authors compute. The recurrent state is bfloat16 then, so replay loses nothing by keeping it as that.
BFLOAT16 = dict(compute_dtype="bfloat16", latent_dtype="bfloat16")

# fmt: off
PRESETS = {
    "small": dict(
        # Sizes.
        size="small", bins=41, stem="patch", length=16, horizon=10, imagine_last=8, replay_capacity=100_000,
        # Learning rate, warm-up, train ratio, entropy and reconstruction scales.
        learning_rate=1e-3, warmup=100, train_ratio=16.0, prefill=1024, entropy_scale=1.5e-2, image_scale=4.0,
        eval_action="mode",  # so much entropy is for exploring; the authors' is less, and they sample
    ),
    # "Paper 4" of the guide: dense layers 512, 512, 1024 with LayerNorm and ReLU, the recurrent state of the papers
    # before it (200, 32 x 32 latents), symlog predictions, batches of 50 x 50, 15 imagined steps.
    "guide": dict(
        size="guide", stem="flat", encoder_units=(512, 512, 1024), cell="gru", norm="layer", activation="relu",
        prior_layers=1, reward_head="symlog_mse", batch_size=50, length=50, num_envs=1, train_ratio=2500.0,
        prefill=1024, replay_capacity=1_000_000, learning_rate=6e-4,
    ),
    "paper": BFLOAT16,
    # The authors' settings by benchmark, where they differ from the above. One environment needs fewer steps for
    # the 1,024 windows that training begins with.
    "paper_atari100k": BFLOAT16 | dict(train_ratio=256.0, num_envs=1, prefill=1088),
    "paper_crafter": BFLOAT16 | dict(train_ratio=512.0, num_envs=1, prefill=1088),
    "paper_dmc_proprio": BFLOAT16 | dict(size="1m", train_ratio=1024.0),
    "paper_dmc_vision": BFLOAT16 | dict(train_ratio=256.0),
}
