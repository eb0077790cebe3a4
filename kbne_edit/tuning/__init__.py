"""The choice of factor and thresholds: made on one half of the items, confirmed once on the other."""
