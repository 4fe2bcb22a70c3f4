"""What an answer is worth: rules for the task, and the teacher by slime's function paths."""
