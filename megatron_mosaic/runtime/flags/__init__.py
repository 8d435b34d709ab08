"""What becomes of every argument of Megatron under a plan: a table, read without torch or Megatron."""
