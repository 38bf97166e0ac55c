"""Other queues' shapes: queues, tasks, a pair. Vocabulary, no mechanism."""
