"""One training step under Megatron: arguments, model, step, checkpoint, report."""
