"""Exchange of models with other libraries."""
