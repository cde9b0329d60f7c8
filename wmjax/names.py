"""What a name that is not valid was meant to be: the names of other projects first, then what is spelled alike."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from wmjax.checks import show
from wmjax.types import UsageError

# What it is called here, as far as an agent has it: what Stable-Baselines3, CleanRL, Brax, rejax and the authors of the
# papers call it.
_TABLE = """
learning_rate model_lr actor_lr critic_lr tokenizer_rate world_model_rate actor_critic_rate vision_learning_rate
  memory_learning_rate: lr learning_rate opt_lr step_size alpha
model_lr world_model_rate learning_rate: model_lr model_learning_rate world_lr wm_lr model_opt_lr
actor_lr actor_critic_rate learning_rate: actor_lr actor_learning_rate policy_lr pi_lr
critic_lr actor_critic_rate learning_rate: critic_lr critic_learning_rate value_lr vf_lr q_lr
batch_size tokenizer_batch world_model_batch actor_critic_batch vision_batch_size memory_batch_size:
  batch bs batchsize minibatch_size train_batch_size
length world_model_length memory_length: batch_length seq_len sequence_length bptt chunk_size seq_length
num_envs: n_envs envs num_environments n_env env_amount nenvs num_env
workers: n_workers num_workers env_processes
steps: total_timesteps timesteps total_steps num_steps n_steps max_steps num_timesteps total_env_steps frames
  num_frames env_steps
replay_capacity: buffer_size memory_size replay_size buffer capacity max_size
prefill collect_steps: learning_starts start_learning random_steps start_steps warmup_steps prefill_steps
discount discount_horizon: gamma discount_factor disc
lambda_: gae_lambda lam lmbda td_lambda return_lambda discount_lambda lambda
entropy_scale: ent_coef entropy_coef entropy_cost actor_ent actent ent entropy entropy_bonus
critic_scale: vf_coef value_coef critic_coef
kl_scale dyn_scale rep_scale: kl_weight kl_coef beta_kl
horizon: imag_horizon imagine_horizon imagination_horizon imag_length rollout_length
grad_clip clip_limit: max_grad_norm clip_grad clip_norm gradient_clip grad_norm clip
slow_critic_rate: tau target_update_rate polyak slow_target_fraction
slow_critic_every: target_update_interval slow_target_update
train_every train_ratio: train_freq train_every update_every update_interval
train_ratio train_steps: gradient_steps updates_per_step utd utd_ratio replay_ratio
adam_epsilon epsilon: eps adam_eps opt_eps epsilon
beta1: betas b1 adam_beta1
beta2: b2 adam_beta2
size: model_size
deter: deter_size recurrent_size rssm_deter gru_size
stoch latent latents: stoch_size latent_size rssm_stoch
hidden units width: hidden_size hidden_units
classes: num_classes n_classes rssm_classes
layers actor_layers: n_layers num_layers
heads: n_heads num_heads
grad_accum: gradient_accumulation gradient_accumulation_steps accumulate_grad_batches accum_steps
compute_dtype: precision dtype amp fp16 bf16 mixed_precision
evolve.population: pop_size popsize population_size
evolve.sigma_init: sigma sigma0 init_std
out: logdir log_dir output_dir save_dir outdir output run_dir exp_dir tensorboard_log
env: task env_id env_name environment game gym_id
env_arg env_args: env_kwargs env_config
agent: algo algorithm model policy
seed: random_seed rng_seed
seeds: n_seeds num_seeds
devices: n_devices num_devices gpus n_gpus
shard_params: fsdp fsdp_devices fsdp_size model_parallel num_shards
image_size: img_size image_shape render_size
action_repeat: frame_skip frameskip skip
eval_every: eval_freq eval_interval eval_frequency
episodes: n_eval_episodes num_eval_episodes eval_episodes n_episodes num_episodes
action eval_action: deterministic greedy
checkpoint_seconds: save_freq save_every checkpoint_every checkpoint_interval checkpoint_freq save_interval
wandb: wandb_project wandb_project_name track project
config preset: configs config_file cfg settings
resume: continue load resume_from from_checkpoint load_run
progress: verbose progress_bar quiet
callback: callbacks on_step log_fn progress_fn
which: checkpoint model_path ckpt
"""
_ROWS = [row.split(":") for row in _TABLE.strip().replace("\n  ", " ").splitlines()]
SYNONYMS = {name: meant for meant, names in _ROWS for name in names.split()}
WORDS = {  # parts of names
    "lr": "learning_rate", "ent": "entropy", "coef": "scale", "weight": "scale", "n": "num", "rep": "repeat",
    "env": "envs", "seq": "length", "len": "length", "imag": "imagine", "wm": "world_model", "val": "critic",
    "value": "critic", "vf": "critic", "policy": "actor", "pi": "actor", "dim": "size", "buffer": "replay",
}  # fmt: skip
MOST = 3  # names that are suggested


def _parts(name: str) -> set[str]:
    words = re.split(r"[_\W]+", name.lower())
    return {part for word in words if word for part in WORDS.get(word, word).split("_")}


def meant(name: str, valid: Sequence[str]) -> list[str]:
    """Valid names that `name` may have been meant to be, the nearest first, none where nothing is near.

    Args:
      name: that is not valid; hyphens are as underscores.
      valid: names, perhaps with dots before the last part, of which a suggestion is one.
    """
    name = name.strip("-").replace("-", "_").lower()
    last = name.rpartition(".")[2]
    here = {candidate.lstrip("-").replace("-", "_").lower(): candidate for candidate in reversed(valid)}
    found = [
        original
        for wanted in SYNONYMS.get(last, "").split()
        for spelled, original in here.items()
        if spelled == wanted or spelled.endswith(f".{wanted}")
    ]
    if found:
        return list(dict.fromkeys(found))[:MOST]
    alike = lambda spelled: difflib.SequenceMatcher(None, last, spelled.rpartition(".")[2]).ratio()
    shared = lambda spelled: len(_parts(last) & _parts(spelled)) / max(len(_parts(last) | _parts(spelled)), 1)
    score = {spelled: max(alike(spelled), 0.5 + shared(spelled) / 2 if shared(spelled) else 0) for spelled in here}
    best = max(score, key=score.get, default=None)
    return [here[best]] if best is not None and score[best] >= 0.6 else []


def did_you_mean(names: Sequence[str]) -> str:
    """The hint, or "" where there are none."""
    if not names:
        return ""
    return f"did you mean {', '.join(names[:-1])}{' or ' * (len(names) > 1)}{names[-1]}?"


def nearest(kind: str, name: str, valid: Iterable[str]) -> UsageError:
    """The error for an unknown name: one line with the nearest valid name, and all of them where they are few."""
    valid = list(valid)
    near = meant(name, valid) if isinstance(name, str) else []
    hint = did_you_mean([repr(x) for x in near])
    if len(valid) < 12 or not near:
        hint += f" valid are {', '.join(valid)}"
    return UsageError(f"{kind}: unknown name {show(name)}; {hint.strip()}")
