"""The model card, and the report as data and as one page."""
