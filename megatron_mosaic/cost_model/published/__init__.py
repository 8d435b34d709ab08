"""Published measurements, and how far the model is from them."""
