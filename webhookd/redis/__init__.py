"""Redis: connections that recover, the queue that adds jobs, and what protects both."""
