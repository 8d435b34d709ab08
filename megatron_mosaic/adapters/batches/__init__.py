"""A script's data: blocks as one process gets them, what stands at every token, and the batch of a plan."""
