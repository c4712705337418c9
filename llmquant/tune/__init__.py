"""What needs the model itself: algorithms that run it, changes of its weights, choices of schemes."""
