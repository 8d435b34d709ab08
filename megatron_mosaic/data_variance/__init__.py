"""How much a plan's step and memory vary with the data: batches drawn from histograms, shared out as in training."""
