"""DARWIN evolves GPT training code and measures what it gained."""
