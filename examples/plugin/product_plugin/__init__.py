"""One of each kind that causalrm_ray lets another package add."""
