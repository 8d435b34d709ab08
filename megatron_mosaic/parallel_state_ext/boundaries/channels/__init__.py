"""What rows and hidden states travel through, and what is expected there."""
