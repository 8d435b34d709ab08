"""Model files from descriptions of other programs: Hugging Face configs, Megatron arguments."""
