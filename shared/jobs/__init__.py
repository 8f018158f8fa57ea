"""Songs as jobs: the record and its state machine, the two queues, and events."""
