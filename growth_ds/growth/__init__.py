"""The growth algebra: axis maps, recipes, plans, and their application to weights and Adam moments."""
