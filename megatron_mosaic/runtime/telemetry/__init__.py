"""What a run tells of itself while it goes on: a few numbers of all ranks, timelines of a few."""
