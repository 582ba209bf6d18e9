"""The book: executed, built, published."""
