"""Whole configurations of the papers, written out: a default that changes has to be changed here, too.

The first preset of an agent has every field; the others say what they change of it.
"""

# fmt: off
CONFIGS = {
    ('dreamer_v1', 'paper'): dict(
        deter=200, hidden=200, stoch=30, min_std=0.1, depth=32, embed=None, encoder_padding='VALID', units=400,
        vector_layers=4, reward_layers=2, cont_layers=3, actor_layers=4, critic_layers=3, cell='gru',
        input_layer=True, activation='elu', conv_activation='relu', free_nats=3.0, use_continue=False,
        reward_transform='identity', kl_scale=1.0, image_scale=1.0, vector_scale=1.0, reward_scale=1.0,
        cont_scale=10.0, horizon=15, imagine_last=0, discount=0.99, lambda_=0.95, bootstrap=True, entropy_scale=0.0,
        exploration=0.3, exploration_half_life=None, exploration_updates=None, exploration_min=0.0, model_lr=0.0006,
        actor_lr=8e-05, critic_lr=8e-05, epsilon=1e-07, grad_clip=100.0, weight_decay=0.0, grad_accum=1,
        batch_size=50, length=50, within_episode=True, over='episodes', num_envs=1, replay_capacity=2500000,
        prefill=2500, pretrain=100, train_every=500, train_steps=100, compute_dtype='bfloat16', remat=False,
        eval_action='mode',
    ),
    ('dreamer_v1', 'paper_discrete'): dict(
        use_continue=True, kl_scale=0.1, horizon=10, exploration=0.4, exploration_updates=200000, exploration_min=0.1,
        replay_capacity=2000000,
    ),
    ('dreamer_v2', 'paper'): dict(
        deter=600, hidden=600, latent='categorical', stoch=32, classes=32, depth=48, embed=None,
        encoder_padding='VALID', units=400, vector_layers=4, reward_layers=4, cont_layers=4, actor_layers=4,
        critic_layers=4, cell='layer_norm_gru', input_layer=True, norm='none', activation='elu', reward_head='normal',
        critic_head='normal', latent_estimator='straight_through', kl_mode='balanced', kl_balance=0.8,
        kl_forward=False, free_nats=0.0, free_mode='avg', use_continue=True, reward_transform='tanh', kl_scale=0.1,
        image_scale=1.0, vector_scale=1.0, reward_scale=1.0, cont_scale=5.0, horizon=15, imagine_last=0,
        discount=0.999, lambda_=0.95, bootstrap=True, actor_grad='auto', actor_grad_mix=0.1, entropy_scale=0.001,
        slow_critic_every=100, slow_critic_rate=1.0, exploration=0.0, model_lr=0.0002, actor_lr=4e-05,
        critic_lr=0.0001, epsilon=1e-05, grad_clip=100.0, weight_decay=1e-06, grad_accum=1, batch_size=16, length=50,
        within_episode=True, over='episodes', prioritize_ends=True, num_envs=1, replay_capacity=2000000,
        prefill=50000, pretrain=1, train_every=16, train_steps=1, compute_dtype='bfloat16', remat=False,
        eval_action='mode', eval_latent='sample',
    ),
    ('dreamer_v2', 'paper_atari'): dict(
        discount=0.995, batch_size=50, train_every=4,
    ),
    ('dreamer_v2', 'paper_dmc'): dict(
        deter=200, hidden=200, free_nats=1.0, use_continue=False, reward_transform='identity', kl_scale=1.0,
        cont_scale=1.0, discount=0.99, entropy_scale=0.0001, model_lr=0.0003, actor_lr=8e-05, critic_lr=8e-05,
        prioritize_ends=False, prefill=1000, pretrain=100, train_every=5,
    ),
    ('dreamer_v2', 'paper_crafter'): dict(
        deter=1024, hidden=1024, norm='layer', kl_scale=1.0, cont_scale=1.0, entropy_scale=0.003, model_lr=0.0001,
        actor_lr=0.0001, prefill=10000, train_every=5,
    ),
    ('dreamer_v3', 'paper'): dict(
        size='200m', deter=None, hidden=None, stoch=None, classes=None, depth=None, units=None, blocks=8, bins=255,
        stem='pool', encoder_units=None, cell='block_gru', norm='rms', activation='silu', prior_layers=2,
        posterior_layers=1, reward_layers=1, cont_layers=1, actor_layers=3, critic_layers=3, reward_head='two_hot',
        critic_head='two_hot', symlog_vectors=True,
        unimix=0.01, free_nats=1.0, dyn_scale=1.0, rep_scale=0.1, image_scale=1.0, vector_scale=1.0, reward_scale=1.0,
        cont_scale=1.0, horizon=15, imagine_last=0, discount_horizon=333.0, lambda_=0.95, actor_unimix=0.01,
        entropy_scale=0.0003, actor_scale=1.0, critic_scale=1.0, replay_critic_scale=0.3, slow_critic_rate=0.02,
        slow_critic_scale=1.0, return_norm_rate=0.01, return_norm_low=5.0, return_norm_high=95.0,
        return_norm_limit=1.0, learning_rate=4e-05, warmup=1000, grad_clip=0.3, grad_accum=1, beta1=0.9, beta2=0.999,
        epsilon=1e-20, batch_size=16, length=64, num_envs=16, train_ratio=32.0, replay_capacity=5000000, prefill=2048,
        online=True, latent_dtype='bfloat16', compute_dtype='bfloat16', remat=False, eval_action='sample',
    ),
    ('dreamer_v3', 'paper_atari100k'): dict(
        num_envs=1, train_ratio=256.0, prefill=1088,
    ),
    ('dreamer_v3', 'paper_crafter'): dict(
        num_envs=1, train_ratio=512.0, prefill=1088,
    ),
    ('dreamer_v3', 'paper_dmc_proprio'): dict(
        size='1m', train_ratio=1024.0,
    ),
    ('dreamer_v3', 'paper_dmc_vision'): dict(
        train_ratio=256.0,
    ),
    ('world_models', 'paper_car'): {
        'latent': 32, 'depth': 32, 'decoder_depth': None, 'encoder_padding': 'VALID', 'encoder_norm': 'none',
        'logvar_init': 0.0, 'decoder_relu': False, 'kl_tolerance': 0.5, 'beta': 1.0, 'recon_scale': 1.0,
        'reduction': 'mean', 'perceptual': 'none',
        'perceptual_scale': 100.0, 'lpips_weights': None, 'vision_learning_rate': 0.0001, 'vision_batch_size': 100,
        'vision_updates': 1000000,
        'hidden': 256, 'mixtures': 5, 'mixture': 'per_dim', 'reward_head': 'none',
        'done_head': False, 'done_pos_weight': 1.0, 'restart_input': False, 'layer_norm': False, 'forget_bias': 1.0,
        'z_source': 'sample', 'temperature': 1.0, 'dream_reward': 'predicted', 'memory_learning_rate': 0.001,
        'memory_final_learning_rate': 1e-05, 'memory_decay': 1.0, 'clip': 'value', 'clip_limit': 1.0,
        'prediction_penalty': 0.0, 'memory_batch_size': 100, 'memory_length': 999, 'memory_updates': 4000,
        'memory_within_episode': True, 'memory_stateful': False, 'inputs': 'zh', 'controller_units': 0,
        'controller_bias': True, 'controller_z': 'sample', 'evolve.where': 'env', 'evolve.strategy': 'auto',
        'evolve.population': 64, 'evolve.sigma_init': 0.1, 'evolve.weight_decay': 0.0, 'evolve.rollouts': 16,
        'evolve.common': True, 'evolve.generations': 1800, 'evolve.mean_every': 25, 'evolve.mean_rollouts': 1024,
        'evolve.horizon': None, 'evolve.starts': 1024, 'evolve.start_from': 'any', 'evolve.restarts': None,
        'eval_action': 'mode', 'collection': 'linear', 'collect_steps': 10000000, 'num_envs': 64,
        'replay_capacity': 10000000, 'latent_dtype': 'float16', 'compute_dtype': 'float32', 'grad_accum': 1,
        'remat': False,
    },
    ('world_models', 'paper_doom'): {
        'latent': 64, 'vision_updates': 308000, 'hidden': 512, 'done_head': True, 'done_pos_weight': 10.0,
        'restart_input': True, 'temperature': 1.15, 'dream_reward': 'survival', 'memory_decay': 0.99999,
        'memory_length': 499, 'memory_updates': 24400, 'memory_stateful': True, 'inputs': 'zch',
        'controller_bias': False, 'evolve.where': 'dream', 'evolve.generations': 200, 'evolve.horizon': 2100,
        'evolve.start_from': 'first', 'collection': 'held', 'collect_steps': 3080000, 'num_envs': 100,
        'replay_capacity': 3080000,
    },
    ('iris', 'paper'): dict(
        vocab_size=512, embed_dim=512, latents=512, channels=64, multipliers=(1, 1, 1, 1, 1), res_blocks=2,
        attention=(8, 16), patch=1, commit_scale=1.0, recon_loss='l1', recon_scale=1.0, perceptual='random_features',
        perceptual_scale=1.0, lpips_weights=None, lpips_dropout=0.0, codebook='gradient', codebook_decay=0.99,
        codebook_reset=0.0, max_blocks=20, layers=10, heads=4, width=256, ff=None, dropout=0.1, norm='pre',
        activation='gelu', position_std=0.02, reward_tokens=False, world_model_length=20,
        policy_channels=(32, 32, 64, 64), lstm_units=512, burn_in=20, horizon=20, discount=0.995, lambda_=0.95,
        entropy_scale=0.001, actor_scale=1.0, critic_scale=1.0, epsilon=0.01, temperature=1.0, eval_temperature=0.5,
        eval_action='sample', tokenizer_rate=0.0001, world_model_rate=0.0001, actor_critic_rate=0.0001,
        weight_decay=0.01, grad_clip=10.0, beta1=0.9, beta2=0.999, adam_epsilon=1e-08, num_envs=1, collect=200,
        tokenizer_updates=200, world_model_updates=200, actor_critic_updates=200, tokenizer_batch=256,
        world_model_batch=64, actor_critic_batch=64, tokenizer_after=5, world_model_after=25, actor_critic_after=50,
        collect_epochs=500, final_epochs=100, replay_capacity=100000, compute_dtype='float32', grad_accum=1,
        remat=False,
    ),
}
# fmt: on
