"""Labelled texts: grammars of our own, data sets of the hub, files; and their splits."""
