"""Load tests of a running server over HTTP and gRPC, with arrivals that do not wait for answers."""
