"""What a distillation step is made of. Torch and transformers, nothing else."""
