"""The reference model: digit images and text in, text and digit images out, built from megatron-core's blocks."""
