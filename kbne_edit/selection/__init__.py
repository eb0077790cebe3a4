"""From scores to an edit: which neurons are selected, and how much that depends on the questions."""
