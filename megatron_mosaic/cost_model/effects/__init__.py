"""One physical effect a file: kernels, collectives, rows between modules, bytes, interference."""
