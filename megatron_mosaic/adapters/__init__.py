"""Models of Megatron's own pretrain scripts under a plan; the scripts stay as they are."""
