"""What a parity check reads of a rank: its gradients of every step, its parameters after the last."""
