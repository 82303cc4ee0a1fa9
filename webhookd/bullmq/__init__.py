"""BullMQ's wire format: what a producer that is not BullMQ writes, so that its workers cannot tell.

Key names, job options, job ids, and ``add_jobs.lua``, the one script that adds jobs to a queue. The facts are
those of the npm packages bullmq 5.81 and 6.7; the differential tests compare this package with both.
"""
