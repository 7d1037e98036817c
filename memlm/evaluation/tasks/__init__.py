"""The evaluation tasks. Each module has `longest`, `tokens` and `run`."""
