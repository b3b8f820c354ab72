"""The small models that ship with the repository, and the scripts that rendered, trained and measured them."""
