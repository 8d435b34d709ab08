"""Every name of Megatron or torch that is replaced, and by what."""
