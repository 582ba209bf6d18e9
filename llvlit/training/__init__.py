"""The shipped family's training: corpus, recipe, loop."""
