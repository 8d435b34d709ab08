"""Settings of all tests."""

from hypothesis import settings

# Times of a busy machine are no property of the code.
settings.register_profile("mosaic", deadline=None, max_examples=60)
settings.load_profile("mosaic")
