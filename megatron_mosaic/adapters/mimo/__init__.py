"""MimoModel: the module `llm`, and one for each key of `modality_submodules`."""
