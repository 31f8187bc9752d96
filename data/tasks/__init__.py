"""Tasks: what is asked and how an answer is scored, one file each."""
