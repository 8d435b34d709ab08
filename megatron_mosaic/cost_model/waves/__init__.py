"""What plans in waves cost: a slice of a task's module, and the step that all slices make."""
