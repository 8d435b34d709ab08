"""When each action starts and ends: replicas folded, a schedule in numbers, the clock, what ranks compute on."""
