"""A package, so that ranks in their own processes import its helpers by name and no installed `tests` hides it."""
