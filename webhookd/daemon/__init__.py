"""The process: its services in order, signals, systemd and logs."""
