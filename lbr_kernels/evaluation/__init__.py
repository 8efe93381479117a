"""Tasks, and how an answer to them is judged."""
