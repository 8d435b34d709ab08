"""Three tasks on the digits over shared modules: captions, image-text pairs, drawings."""
