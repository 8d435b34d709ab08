"""One Megatron optimizer per module, their saved state, and the sums of their gradients."""
