"""What a name that is not valid was meant to be: the names of other projects first, then what is spelled alike."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from wmjax.checks import show
from wmjax.types import UsageError

# What Stable-Baselines3, CleanRL, Brax, rejax and the authors of the papers call it -> what it is called here. Those
# that an agent has are meant.
_RATES = "learning_rate model_lr actor_lr critic_lr tokenizer_rate world_model_rate actor_critic_rate"
_RATES += " vision_learning_rate memory_learning_rate"
_BATCHES = "batch_size tokenizer_batch world_model_batch actor_critic_batch vision_batch_size memory_batch_size"
_LENGTHS = "length world_model_length memory_length"
SYNONYMS: dict[str, str] = {
    **dict.fromkeys("lr learning_rate opt_lr step_size alpha".split(), _RATES),
    **dict.fromkeys(
        "model_lr model_learning_rate world_lr wm_lr model_opt_lr".split(), "model_lr world_model_rate learning_rate"
    ),
    **dict.fromkeys("actor_lr actor_learning_rate policy_lr pi_lr".split(), "actor_lr actor_critic_rate learning_rate"),
    **dict.fromkeys(
        "critic_lr critic_learning_rate value_lr vf_lr q_lr".split(), "critic_lr actor_critic_rate learning_rate"
    ),
    **dict.fromkeys("batch bs batchsize minibatch_size train_batch_size".split(), _BATCHES),
    **dict.fromkeys("batch_length seq_len sequence_length bptt chunk_size seq_length".split(), _LENGTHS),
    **dict.fromkeys("n_envs envs num_environments n_env env_amount nenvs num_env".split(), "num_envs"),
    **dict.fromkeys("n_workers num_workers env_processes".split(), "workers"),
    **dict.fromkeys(
        "total_timesteps timesteps total_steps num_steps n_steps max_steps num_timesteps total_env_steps frames "
        "num_frames env_steps".split(),
        "steps",
    ),
    **dict.fromkeys("buffer_size memory_size replay_size buffer capacity max_size".split(), "replay_capacity"),
    **dict.fromkeys("learning_starts start_learning random_steps start_steps warmup_steps prefill_steps".split(),
                    "prefill collect_steps"),
    **dict.fromkeys("gamma discount_factor disc".split(), "discount discount_horizon"),
    **dict.fromkeys("gae_lambda lam lmbda td_lambda return_lambda discount_lambda lambda".split(), "lambda_"),
    **dict.fromkeys("ent_coef entropy_coef entropy_cost actor_ent actent ent entropy entropy_bonus".split(),
                    "entropy_scale"),
    **dict.fromkeys("vf_coef value_coef critic_coef".split(), "critic_scale"),
    **dict.fromkeys("kl_weight kl_coef beta_kl".split(), "kl_scale dyn_scale rep_scale"),
    **dict.fromkeys("imag_horizon imagine_horizon imagination_horizon imag_length rollout_length".split(), "horizon"),
    **dict.fromkeys("max_grad_norm clip_grad clip_norm gradient_clip grad_norm clip".split(), "grad_clip clip_limit"),
    **dict.fromkeys("tau target_update_rate polyak slow_target_fraction".split(), "slow_critic_rate"),
    **dict.fromkeys("target_update_interval slow_target_update".split(), "slow_critic_every"),
    **dict.fromkeys("train_freq train_every update_every update_interval".split(), "train_every train_ratio"),
    **dict.fromkeys("gradient_steps updates_per_step utd utd_ratio replay_ratio".split(), "train_ratio train_steps"),
    **dict.fromkeys("eps adam_eps opt_eps epsilon".split(), "adam_epsilon epsilon"),
    **dict.fromkeys("betas b1 adam_beta1".split(), "beta1"),
    **dict.fromkeys("b2 adam_beta2".split(), "beta2"),
    **dict.fromkeys("model_size".split(), "size"),
    **dict.fromkeys("deter_size recurrent_size rssm_deter gru_size".split(), "deter"),
    **dict.fromkeys("stoch_size latent_size rssm_stoch".split(), "stoch latent latents"),
    **dict.fromkeys("hidden_size hidden_units".split(), "hidden units width"),
    **dict.fromkeys("num_classes n_classes rssm_classes".split(), "classes"),
    **dict.fromkeys("n_layers num_layers".split(), "layers actor_layers"),
    **dict.fromkeys("n_heads num_heads".split(), "heads"),
    **dict.fromkeys("precision dtype amp fp16 bf16 mixed_precision".split(), "compute_dtype"),
    **dict.fromkeys("pop_size popsize population_size".split(), "evolve.population"),
    **dict.fromkeys("sigma sigma0 init_std".split(), "evolve.sigma_init"),
    **dict.fromkeys("logdir log_dir output_dir save_dir outdir output run_dir exp_dir tensorboard_log".split(), "out"),
    **dict.fromkeys("task env_id env_name environment game gym_id".split(), "env"),
    **dict.fromkeys("env_kwargs env_config".split(), "env_arg env_args"),
    **dict.fromkeys("algo algorithm model policy".split(), "agent"),
    **dict.fromkeys("random_seed rng_seed".split(), "seed"),
    **dict.fromkeys("n_seeds num_seeds".split(), "seeds"),
    **dict.fromkeys("n_devices num_devices gpus n_gpus".split(), "devices"),
    **dict.fromkeys("img_size image_shape render_size".split(), "image_size"),
    **dict.fromkeys("frame_skip frameskip skip".split(), "action_repeat"),
    **dict.fromkeys("eval_freq eval_interval eval_frequency".split(), "eval_every"),
    **dict.fromkeys("n_eval_episodes num_eval_episodes eval_episodes n_episodes num_episodes".split(), "episodes"),
    **dict.fromkeys("deterministic greedy".split(), "action eval_action"),
    **dict.fromkeys("save_freq save_every checkpoint_every checkpoint_interval checkpoint_freq save_interval".split(),
                    "checkpoint_seconds"),
    **dict.fromkeys("wandb_project wandb_project_name track project".split(), "wandb"),
    **dict.fromkeys("configs config_file cfg settings".split(), "config preset"),
    **dict.fromkeys("continue load resume_from from_checkpoint load_run".split(), "resume"),
    **dict.fromkeys("verbose progress_bar quiet".split(), "progress"),
    **dict.fromkeys("callbacks on_step log_fn progress_fn".split(), "callback"),
    **dict.fromkeys("checkpoint model_path ckpt".split(), "which"),
}  # fmt: skip
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
