"""The views for operators: metrics, health, traces and the status page."""
