"""How good a predicted step is: FLOPs of the devices' peak, and beside the backbone alone."""
