"""Scores to an edit: which neurons are chosen, and how far that depends on the questions."""
