"""Environments in processes of their own: what the vectorised environments of several libraries have in common."""
