"""What runs a job: the executor, trainers, servers, and the transports between them."""
