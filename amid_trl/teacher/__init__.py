"""What the teacher expects, wherever it is: one kind of teacher in each file."""
