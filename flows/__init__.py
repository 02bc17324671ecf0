"""What a person starts: Prefect flows, the command line and the supervisor of the local stack."""
