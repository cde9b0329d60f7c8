"""Presets of IRIS: what they change of the paper's defaults."""

# fmt: off
PRESETS = {
    "small": dict(
        # Sizes. An MLP on patches of 16 pixels instead of VQGAN.
        patch=16, multipliers=(), res_blocks=1, channels=128, latents=32, embed_dim=32, vocab_size=256,
        layers=2, heads=2, width=64, dropout=0.0,
        max_blocks=4,  # each position learns its attention by itself: few learn faster
        world_model_length=4, policy_channels=(32,), lstm_units=64, burn_in=2, horizon=6,
        # A small ball is lost in a mean of absolute errors.
        recon_loss="delta_iris", recon_scale=10.0, perceptual="none", codebook_reset=0.001, codebook_decay=0.98,
        # Rates.
        tokenizer_rate=1e-3, world_model_rate=2e-3, actor_critic_rate=1e-3, entropy_scale=1e-2, discount=0.97,
        # Schedule.
        num_envs=16, collect=8, tokenizer_batch=32, world_model_batch=32, actor_critic_batch=64,
        tokenizer_updates=80, world_model_updates=20, actor_critic_updates=10,
        tokenizer_after=4, world_model_after=20, actor_critic_after=40,
    ),
    # "Paper 5" of the guide: a codebook of 512 x 64, six layers of width 512 with eight heads, reward tokens, 15
    # imagined steps. `norm="post"`, `activation="relu"` and `ff=2048` give its transformer layers to the letter.
    "guide": dict(
        vocab_size=512, embed_dim=64, width=512, heads=8, layers=6, reward_tokens=True, horizon=15,
    ),
    "paper": dict(collect_epochs=500, final_epochs=100),
}
