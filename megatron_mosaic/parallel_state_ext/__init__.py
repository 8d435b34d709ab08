"""Who talks to whom: process groups per module, boundaries between modules, one optimizer over all of them."""
