"""Answers from a trained model, and how right they are."""
