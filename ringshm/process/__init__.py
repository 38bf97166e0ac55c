"""One process's attachment to a segment: how it is built and found, fork, spawn, exit, and who may still come."""
