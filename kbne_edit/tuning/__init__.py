"""Chooses factor and thresholds on one half of the items, and confirms the choice once on the other."""
