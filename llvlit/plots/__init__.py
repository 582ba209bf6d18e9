"""The house's plots."""
