"""Who is told: console, wandb, TensorBoard, trackio."""
