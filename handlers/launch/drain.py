"""What a launcher and TorchServe's workers agree on for an orderly end, see `handlers.servers.draining`."""

DRAIN_HEADER = "X-MPM-Drain"
DRAIN_SECRET_VARIABLE = "MPM_DRAIN_SECRET"  # set by the launcher, so that nobody else can end a worker
