"""A plan, its prediction, its search and a run of it as one HTML page that needs no network."""
