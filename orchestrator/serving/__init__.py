"""`tuneyard serve`: a model over HTTP on this machine, exchanged while it answers."""
