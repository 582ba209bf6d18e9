"""A decoder as an exact system in depth: models, tokens, replay, its check, frozen layers."""
