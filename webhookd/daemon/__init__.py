"""The process: its services in their order, signals, systemd and logs."""
