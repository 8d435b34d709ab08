"""Does a Megatron script under a plan compute what it computes on one process?"""
