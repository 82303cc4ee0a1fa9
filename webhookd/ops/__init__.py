"""What operators see: metrics, health, traces and the status page."""
