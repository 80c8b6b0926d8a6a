"""Our BERT: the module, its layout table, its initialisation and its cost."""
