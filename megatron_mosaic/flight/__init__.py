"""What every rank is doing, so that whoever finds it dead, stopped or hung can say so."""
