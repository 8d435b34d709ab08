"""LLaVAModel: modules `vision` (tower and projection) and `llm`."""
