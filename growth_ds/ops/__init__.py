"""Operations of the model that have more than one implementation; each file says which is taken when."""
