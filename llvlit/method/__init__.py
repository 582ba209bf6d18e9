"""System identification: directions, bases, surrogates, gains, agreement, control, steering."""
