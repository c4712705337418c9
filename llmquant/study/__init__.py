"""Many models compared: which cells there are, what each is known by, running them, keeping what they found."""
