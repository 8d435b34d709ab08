"""What lies in a checkpoint's directory: written, listed, and seen to be whole before it is loaded."""
