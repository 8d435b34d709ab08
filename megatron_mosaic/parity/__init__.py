"""Does a plan compute what one process computes?"""
