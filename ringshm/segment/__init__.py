"""Memory and names: the layout (arithmetic), the segment's file, semaphores, FIFOs. Knows nothing that is above it."""
