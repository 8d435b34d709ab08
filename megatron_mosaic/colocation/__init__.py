"""How modules share one GPU: quotas, lanes, and the executor that runs a rank's part of a schedule."""
