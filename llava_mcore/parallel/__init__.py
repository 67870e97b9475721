"""How the processes divide the work: groups are built once here and passed to everyone who needs them."""
