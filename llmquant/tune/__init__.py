"""What needs the model itself: algorithms that run it block by block, changes of its weights, choices between schemes."""
