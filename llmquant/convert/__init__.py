"""A checkpoint made from a checkpoint: what is done to the plain model, what is read for it, and the writing."""
