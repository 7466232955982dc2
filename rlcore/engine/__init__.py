"""The lean loop: config, tasks, model, sampler, rollout, trainer, evaluation, checkpoints and logs."""
